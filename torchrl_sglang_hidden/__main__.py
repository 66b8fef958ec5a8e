"""``python -m torchrl_sglang_hidden`` runs the command line of `cli`, as ``torchrl-sglang-hidden`` does."""

from torchrl_sglang_hidden.cli import main

if __name__ == "__main__":
    main()
