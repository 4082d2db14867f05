"""`python -m miniplm`, which is what `torchrun -m miniplm run ...` starts in each process."""

from miniplm.cli import main

if __name__ == "__main__":
    main()
