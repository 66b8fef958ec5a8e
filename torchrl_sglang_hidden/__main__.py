"""``python -m torchrl_sglang_hidden`` is ``torchrl-sglang-hidden``."""

from torchrl_sglang_hidden.cli import main

if __name__ == "__main__":
    main()
