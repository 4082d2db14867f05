"""MiniLLM (Gu et al. 2024, arXiv 2306.08543) for pre-training: the student writes on, the teacher judges.

In: a batch of packed instances. Out: a loss whose gradient estimates that of the reverse KL from student q to teacher p
over what the student writes, as a *sequence*; and plain cross entropy on what it was given to begin with.

    instance      x_1 ... x_P x_P+1 ... x_T+1     P: `prompt_tokens`
    written       x_1 ... x_P y_1   ... y_G       G = T + 1 - P sampled tokens
    positions     |-- P-1 --| |----- G -----|     cross entropy | single step and long term

With r_t = log p(y_t) - log q(y_t), the gradient of KL(q || p) is the expectation over y ~ q of the sum over t of

    grad KL(q(. | y_<t) || p(. | y_<t))           the single step: exact, over the whole vocabulary
    - R_t grad log q(y_t)                         the long term; R_t: the sum of r_t+1 ... r_G

(*derived*; the tests take the expectation over all continuations), and this is 1/G of it, a mean per token. On top:

- Sampling is from (1 - a) q + a p, `teacher_mix` = a, and the long term is weighed by w_t = q / ((1 - a) q + a p) of
  the token at t alone, which is how the paper approximates the product over the prefix. The single step has no w_t: it
  does not depend on y_t, and w_t is 1 on average.
- R_t is a mean over the tokens left, not a sum (`length_normalised`): the paper's, against short answers. Ours all have
  one length; here it keeps the beginning from outweighing the end.
- r_t is clipped at `reward_clip`, in the long term only.
- From R_t is taken what the rewards so far, r_1 ... r_t-1, let expect (`baseline`). That depends on the prefix alone,
  so no expectation moves. *Ours*: the paper has none, and its code whitens over the batch of all processes, by which
  the gradient would depend on micro-batches and on the number of processes. With this it does not.

What the authors' code (microsoft/LMOps, minillm/) does and this does not: its R_t contains r_t, though the single step
has it already, and is discounted by 0.95 a token; it uses samples for four epochs, which is what PPO's clipped ratio is
for: here a sample is used once, its ratio is 1, the clip would never act, and PPO is left out. Its L_PT, cross entropy
on other data, would be a second forward pass, for which the MiniPLM paper's count (4N + 2N_teacher for a token) has no
room: here it is taken where the pass goes anyway, over the prompt, which is real text. *Our reading*.

Cost: the student writes (a pass), reads and learns (three); the teacher writes with it, where mixed in, and judges.
Memory: hidden states, and three gradients of the head; logits go by in chunks. Promised: what is sampled for an
instance, and what it adds to the loss, depend on the weights, the seed and its position in the training alone; so a
batch's loss is the mean of its parts' (in low precision as far as logits do not depend on the size of a batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from miniplm.errors import RecipeError
from miniplm.models.continuation import continuations, uniform_numbers
from miniplm.models.head import head_of, hidden_states, token_logp
from miniplm.models.losses import cross_entropy, reverse_kl
from miniplm.recipe import MiniLLMSettings
from miniplm.training.objectives import Batch

_STREAM = 0x4D4C4C4D  # Philox's highest counter word: apart from other draws with the same key


class Shares(NamedTuple):
    """What each target weighs; an instance weighs in both as it does in the batch.

    prompt: `[B, P-1]`; continuation: `[B, G]`; float32, of sum 1 each unless an instance has nothing that counts.
    """

    prompt: Tensor
    continuation: Tensor


class MiniLLM:
    """The objective.

    Attributes:
        teacher: frozen, in evaluation mode; it works in its own dtype, on the device of the student.
        settings: of the recipe.
        vocabulary: tokens of the tokenizer: what is sampled, and what q and p are over in both terms of the gradient.
        prompt_tokens: P.
        seed: of sampling.

    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        settings: MiniLLMSettings,
        *,
        vocabulary: int,
        sequence_length: int,
        seed: int,
    ) -> None:
        """Prepare the teacher.

        Args:
            teacher: with a linear head (`check_head`) of at least `vocabulary` tokens.
            settings: of the recipe.
            vocabulary: tokens of the tokenizer.
            sequence_length: T, predicted positions of an instance.
            seed: of the training.

        Raises:
            RecipeError: the prompt has fewer than two tokens, or leaves none to write.

        """
        self.teacher: PreTrainedModel = teacher.requires_grad_(False).eval()
        self.settings, self.vocabulary, self.seed = settings, vocabulary, seed
        self.prompt_tokens = settings.prompt_tokens or 3 * sequence_length // 4
        if not 2 <= self.prompt_tokens <= sequence_length:
            raise RecipeError(
                "MiniLLM needs a prompt with something to predict in it, and something to write after it.",
                facts={
                    "objective.prompt_tokens": f"{self.prompt_tokens:,}",
                    "expected": f"2 to {sequence_length:,}, which is sequence_length",
                },
            )

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.loss`, and `judge` for what the loss and the metrics are."""
        return self.judge(model, self.written(model, batch), batch["weights"])

    def written(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The beginnings of the instances as the student continues them: `[B, T+1]` int64."""
        prompts = batch["input_ids"][:, : self.prompt_tokens]
        self.teacher.to(prompts.device)  # costs nothing where it is there
        count = batch["input_ids"].shape[1] + 1 - self.prompt_tokens
        uniform = torch.from_numpy(uniform_numbers(_STREAM, self.seed, batch["positions"].tolist(), count))
        sampled = continuations(
            model,
            prompts,
            uniform.to(prompts.device),
            vocabulary=self.vocabulary,
            temperature=self.settings.temperature,
            mixed_with=self.teacher if self.settings.teacher_mix else None,
            mix=self.settings.teacher_mix,
        )
        return torch.cat([prompts, sampled], dim=1)

    def judge(self, model: PreTrainedModel, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of given sequences: next_token * cross entropy + reverse KL, and the long term's gradient.

        The long term adds to the gradient and nothing to the value: that of -R log q means nothing, and would drown the
        rest in a loss curve.

        Args:
            model: the student.
            ids: `[B, T+1]`, int64; from the P-th on they are taken as sampled.
            weights: `[B, T]`, of the instances as they were; see `Batch`.

        Returns:
            The loss (nats, float32 scalar), and metrics, means per token: `cross_entropy` on the prompt, `reverse_kl`,
            `reward` (log p - log q of sampled tokens, not clipped) and `entropy` of the student, estimated from them.

        """
        prompt, shares = self.prompt_tokens, shares_of(weights, ids, self.prompt_tokens)
        read, sampled, share = ids[:, :-1], ids[:, prompt:].flatten(), shares.continuation.flatten()
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            told = hidden_states(self.teacher, read)[:, prompt - 1 :].flatten(0, 1)
        hidden = hidden_states(model, read)
        given, wrote = hidden[:, : prompt - 1].flatten(0, 1), hidden[:, prompt - 1 :].flatten(0, 1)
        head, teacher_head = head_of(model), head_of(self.teacher)

        plain = cross_entropy(given, *head, ids[:, 1:prompt].flatten(), shares.prompt.flatten())
        single = reverse_kl(wrote, *head, told, *teacher_head, share, vocabulary=self.vocabulary)
        loss = self.settings.next_token * plain + single

        student = _Seen.of(wrote, *head, self.vocabulary, _working_dtype(head[0]))
        teacher = _Seen.of(told, *teacher_head, self.vocabulary, teacher_head[0].dtype)
        logq, logp = student.logp(sampled), teacher.logp(sampled)
        ratio = self._importance(student, teacher, sampled, logq, logp)
        if torch.is_grad_enabled():
            advantage = self._advantage((logp - logq).view_as(shares.continuation)).flatten()
            long_term = cross_entropy(wrote, *_first(self.vocabulary, *head), sampled, share * ratio * advantage)
            loss = loss + long_term - long_term.detach()
        metrics = {
            "cross_entropy": plain,
            "reverse_kl": single,
            "reward": ((logp - logq) * share).sum(),
            "entropy": -(logq * ratio * share).sum(),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _advantage(self, rewards: Tensor) -> Tensor:
        settings = self.settings
        clipped = rewards.clamp(-settings.reward_clip, settings.reward_clip)
        return advantages(clipped, length_normalised=settings.length_normalised, baseline=settings.baseline)

    def _importance(self, student: _Seen, teacher: _Seen, sampled: Tensor, logq: Tensor, logp: Tensor) -> Tensor:
        """w_t of each sampled token, float32 `[B*G]`."""
        heat, mix = self.settings.temperature, self.settings.teacher_mix
        if heat != 1:
            logp = teacher.logp(sampled, heat) if mix else logp
            return importance(logq, student.logp(sampled, heat), logp, mix)
        return importance(logq, logq, logp, mix)


def shares_of(weights: Tensor | None, ids: Tensor, prompt_tokens: int) -> Shares:
    """What each target of prompt and continuation weighs.

    On the prompt, targets that do not count have no weight. Of the continuation every token counts, however long the
    instance was: what is sampled is there. But an instance that ends within its prompt is not continued: after padding
    there is nothing to write; it keeps its weight on the prompt and has none on what was sampled.

    Args:
        weights: `[B, T]`, of the batch, or None.
        ids: `[B, T+1]`.
        prompt_tokens: P, at least 2.

    """
    batch, length = ids.shape
    given, written = prompt_tokens - 1, length - prompt_tokens
    if weights is None:
        even = torch.full((batch, 1), 1 / batch, device=ids.device)
        return Shares(even.expand(-1, given) / given, even.expand(-1, written) / written)
    instance = weights.sum(dim=1, keepdim=True)
    counts = weights[:, :given]
    total = counts.sum(dim=1, keepdim=True)
    prompt = counts * (instance / total.where(total > 0, 1))
    goes_on = weights[:, given - 1 :].sum(dim=1, keepdim=True) > 0  # a target that counts from the prompt's last on
    return Shares(prompt, (instance * goes_on / written).expand(-1, written))


def advantages(rewards: Tensor, *, length_normalised: bool, baseline: bool) -> Tensor:
    """What follows each token, `[B, G]`: R_t, less what the rewards before let expect; 0 for the last.

    Args:
        rewards: `[B, G]`, float32, r_t.
        length_normalised: means over the tokens left, not sums.
        baseline: take off the mean of the rewards before (0 for the first token) for each token left.

    """
    order = torch.arange(rewards.shape[1], device=rewards.device)
    left = order.flip(0)
    result = rewards.flip(1).cumsum(dim=1).flip(1) - rewards
    if baseline:
        result = result - left * (rewards.cumsum(dim=1) - rewards) / order.clamp(min=1)
    return result / left.clamp(min=1) if length_normalised else result


def importance(logq: Tensor, from_student: Tensor, from_teacher: Tensor, mix: float) -> Tensor:
    """w_t: q / ((1 - mix) s + mix p) of sampled tokens, whatever the shape; at most 1 / (1 - mix) where s is q.

    Args:
        logq: log q, nats.
        from_student: log s, of the student at the temperature of sampling.
        from_teacher: log p, of the teacher at the temperature of sampling; not asked where `mix` is 0.
        mix: share of the teacher in sampling.

    """
    if not mix:
        return (logq - from_student).exp()
    mixed = torch.logaddexp(from_student + np.log1p(-mix), from_teacher + np.log(mix))
    return (logq - mixed).exp()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a model makes of the positions where tokens were sampled, without graph, in the dtype of its products.

    hidden: `[N, D]`; weight: `[V, D]` and bias: `[V]` or None, of the tokenizer's tokens only.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: int, dtype: torch.dtype) -> _Seen:
        weight, bias = _first(vocabulary, weight.detach(), None if bias is None else bias.detach())
        return _Seen(hidden.detach().to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def logp(self, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the targets `[N]` at a temperature, float32 `[N]`."""
        hidden, bias = self.hidden, self.bias
        if temperature != 1:
            hidden, bias = hidden / temperature, None if bias is None else bias / temperature
        with torch.autocast(hidden.device.type, enabled=False):
            return token_logp(hidden, self.weight, bias, targets)


def _first(vocabulary: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight[:vocabulary], None if bias is None else bias[:vocabulary]


def _working_dtype(weight: Tensor) -> torch.dtype:
    """What products with a student's weight are taken in."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
