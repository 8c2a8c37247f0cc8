"""Convert the HuggingFace models that the settings name, so that no GPU waits for it later.

python -m recipes.convert (--recipe NAME | --conf FILE) [key=value ...]

Takes what recipes.train takes. A model is converted once, into the cache (TGDPO_CACHE), and compared with HuggingFace's
on the CPU.
"""

from recipes.settings import read_command_line
from tgdpo_megatron.checkpoint.located import convert_models
from tgdpo_megatron.errors import one_sentence_errors
from tgdpo_megatron.report.terminal import Loudness


def main() -> None:
    with one_sentence_errors():
        command = read_command_line("recipes.convert", __doc__)
        config, found = convert_models(command.config, quiet=command.loudness == Loudness.QUIET)
        for role, source in found.items():
            print(f"model.{role}={source}: {getattr(config.model, role)}")


if __name__ == "__main__":
    main()
