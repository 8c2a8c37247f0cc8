"""Score pairs with frozen models.

python -m recipes.score (--recipe NAME | --conf FILE) [--nproc-per-node N] [key=value ...]
"""

import os

from recipes.settings import read_command_line
from tgdpo_megatron.config import check_layout, on_device
from tgdpo_megatron.errors import one_sentence_errors
from tgdpo_megatron.preflight import check_files


def main() -> None:
    with one_sentence_errors():
        command = read_command_line("recipes.score", __doc__)
        config, processes, nodes = command.config, command.processes, command.nodes
        if "RANK" not in os.environ:
            command.check_machines()
            check_layout(config, world_size=command.ranks)
            check_files(config)
        # torch and Megatron take seconds to load. They are loaded only once the settings are known to be good, and
        # Megatron only in the ranks, once the packages that it uses have been checked.
        from tgdpo_megatron.platform.processes import job

        with job(
            "recipes.score",
            processes=processes,
            nodes=nodes,
            timeout_minutes=config.train.distributed_timeout_minutes,
            rank_timeout_minutes=config.train.rank_timeout_minutes,
        ) as ranks:
            config = on_device(config, ranks.device.type)
            from tgdpo_megatron.planning import out_of_memory
            from tgdpo_megatron.score import score

            with out_of_memory.explained("score", config, ranks):
                score(config, ranks, command.loudness)


if __name__ == "__main__":
    main()
