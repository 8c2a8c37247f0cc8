"""What the wheel holds; all else is said in pyproject.toml.

recipes, tools, conf and slurm lie beside the package here, and inside of it in the wheel: tgdpo_megatron/commands.py.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ("recipes", "tools", "conf", "slurm")
found = find_namespace_packages(include=["tgdpo_megatron*", *BESIDE, "tools.*"])

setup(
    packages=[name if name.startswith("tgdpo_megatron") else f"tgdpo_megatron.repository.{name}" for name in found],
    package_dir={f"tgdpo_megatron.repository.{name}": name for name in BESIDE},
    include_package_data=False,
)
