"""`python -m tgdpo_megatron MODULE [ARGUMENTS]` starts any of the programs."""

from tgdpo_megatron.commands import main

if __name__ == "__main__":
    main()
