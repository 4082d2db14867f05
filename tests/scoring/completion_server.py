"""A server of completions for the tests, in a process of its own: true log-probabilities of a `transformers` model.

`python completion_server.py --model FOLDER --dialect vllm|echo` prints its port. Standard library but for the model.
It answers `POST /v1/completions` as vLLM or as OpenAI's old `echo` does, `GET /seen` with what it has been asked, and
`POST /faults` to change how it misbehaves:
    key         the bearer token that it wants
    every       {"n": 3, "status": 429, "retry_after": "0"}: each n-th completion is refused so, n = 1: each
    slow        seconds that an answer takes
    spoil       how an answer is wrong: short, long, other_id, null, nan, positive, other_text, late, html, redirect
    bos         true: a token 1 is put in front of a text; "hidden": and is not echoed
    strict      true: settings that OpenAI's server does not know are refused
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import AutoModelForCausalLM

KNOWN = {"model", "prompt", "max_tokens", "temperature", "echo", "logprobs"}  # to a strict server
BOS = 1


class Model:
    """Token ids to log-probabilities: `[n-1, V]` float64 for n ids."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        path = folder / "tokenizer.json"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else None
        self.lock = threading.Lock()

    def logp(self, ids: list[int]) -> torch.Tensor:
        with self.lock, torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    def spell(self, token: int) -> str:
        if self.tokenizer is None:
            return f"<{token}>"
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


class State:
    """What has been asked, and how to misbehave."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.faults: dict[str, Any] = {}
        self.clear()

    def clear(self) -> None:
        self.requests = 0
        self.answered: list[Any] = []  # prompts, in the order of their answers
        self.bodies: list[list[str]] = []  # the settings of each request
        self.keys: list[str | None] = []
        self.under_way = self.most_under_way = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server.state
        names = ("requests", "answered", "bodies", "keys", "most_under_way")
        self.send(200, {name: getattr(state, name) for name in names})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        if self.path == "/faults":
            state.faults = body
            state.clear()
            self.send(200, {})
            return
        with state.lock:
            state.requests += 1
            number = state.requests
            state.under_way += 1
            state.most_under_way = max(state.most_under_way, state.under_way)
            state.bodies.append(sorted(body))
            state.keys.append(self.headers.get("Authorization"))
        try:
            self.complete(body, number)
        except BrokenPipeError:
            pass  # the client was killed
        finally:
            with state.lock:
                state.under_way -= 1

    def complete(self, body: dict[str, Any], number: int) -> None:
        state, faults = self.server.state, self.server.state.faults
        time.sleep(faults.get("slow", 0))
        key = faults.get("key")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            said = self.headers.get("Authorization")
            self.send(401, {"error": {"message": f"Incorrect API key provided: {said}"}})
            return
        every = faults.get("every")
        if every and number % every["n"] == 0:
            headers = {"Retry-After": every["retry_after"]} if "retry_after" in every else {}
            self.send(every["status"], {"error": {"message": "not now\x1b[2J"}}, headers)
            return
        if faults.get("spoil") == "redirect":
            self.send(307, {}, {"Location": f"http://127.0.0.1:{self.server.server_port}/v1/completions/"})
            return
        if faults.get("spoil") == "html":
            self.send(200, None)
            return
        if faults.get("strict") and (unknown := sorted(set(body) - KNOWN)):
            self.send(400, {"error": {"message": f"Unrecognized request argument supplied: {unknown[0]}"}})
            return
        answer = self.answer(body)
        with state.lock:
            state.answered.append(body["prompt"])
        self.send(200, answer)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        model, faults = self.server.model, self.server.state.faults
        ids = body["prompt"]
        if isinstance(ids, str):
            assert model.tokenizer is not None
            ids = model.tokenizer.encode(ids, add_special_tokens=False).ids
            if faults.get("bos") and body.get("add_special_tokens", True):
                ids = [BOS, *ids]
        if self.server.dialect == "vllm" and body.get("prompt_logprobs") is not None:
            choice = vllm_choice(model, ids, body)
        elif body.get("echo"):
            choice = echo_choice(model, ids, faults.get("spoil") == "late", faults.get("bos") == "hidden")
        else:
            choice = {"index": 0, "text": "x", "logprobs": None}
        answer = {"object": "text_completion", "model": body["model"], "choices": [choice]}
        answer["usage"] = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        if len(ids) > 8:  # the short ones ask for the dialect
            spoil(choice, faults.get("spoil"), answer)
        return answer

    def send(self, status: int, answer: dict[str, Any] | None, headers: dict[str, str] | None = None) -> None:
        content = b"<html>hello</html>" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def vllm_choice(model: Model, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
    logp = model.logp(ids)
    entries: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(ids[1:]):
        ranked = {token, *logp[place].topk(body["prompt_logprobs"]).indices.tolist()}
        entries.append(
            {
                str(i): {
                    "logprob": float(logp[place, i]),
                    "rank": int((logp[place] > logp[place, i]).sum()) + 1,
                    "decoded_token": model.spell(i),
                }
                for i in ranked
            }
        )
    choice = {"index": 0, "text": "x", "logprobs": None, "prompt_logprobs": entries}
    if body.get("return_token_ids"):
        choice |= {"prompt_token_ids": ids, "token_ids": [int(logp[-1].argmax())]}
    return choice


def echo_choice(model: Model, ids: list[int], late: bool, hide_first: bool) -> dict[str, Any]:
    """With the generated token at the end; `late`: after each token instead of before it."""
    logp = model.logp(ids)
    generated = int(logp[-1].argmax())
    everything = [*ids, generated]
    values: list[float | None] = [None]
    tops: list[dict[str, float] | None] = [None]
    for place, token in enumerate(everything[1:], start=1):
        row = logp[min(place, len(ids) - 1) if late else place - 1]
        best = int(row.argmax())
        values.append(float(row[token]))
        tops.append({model.spell(best): float(row[best]), model.spell(token): float(row[token])})
    strings = [model.spell(token) for token in everything]
    if hide_first:
        strings, values, tops = strings[1:], [None, *values[2:]], [None, *tops[2:]]
    offsets = [sum(map(len, strings[:place])) for place in range(len(strings))]
    found = {"tokens": strings, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return {"index": 0, "text": "".join(strings), "logprobs": found}


def spoil(choice: dict[str, Any], how: str | None, answer: dict[str, Any]) -> None:
    entries = choice.get("prompt_logprobs")
    echoed = choice.get("logprobs")
    if how == "short":
        if entries is not None:
            del entries[-1]
        if echoed is not None:
            for values in echoed.values():
                del values[2:4]
            answer.pop("usage")
    elif how == "long" and entries is not None:
        entries.append(entries[-1])
    elif how == "long" and echoed is not None:
        for values in echoed.values():
            values.append(values[-1])
    elif how == "other_id" and entries is not None:
        entries[2] = {"999": next(iter(entries[2].values()))}
    elif how == "other_text" and echoed is not None:
        echoed["tokens"][2] = "something else"
    elif how in ("null", "nan", "positive"):
        value = {"null": None, "nan": float("nan"), "positive": 0.5}[how]
        if entries is not None:
            for entry in entries[2].values():
                entry["logprob"] = value
        if echoed is not None:
            echoed["token_logprobs"][2] = value


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def __init__(self, port: int, model: Model, dialect: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.dialect, self.state = model, dialect, State()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dialect", choices=["vllm", "echo"], required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    server = Server(arguments.port, Model(arguments.model), arguments.dialect)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
