"""Adds the small model, which lies beside the packages, to the wheel. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSmallModel(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            configs = Path(self.build_lib, "pipeline", "configs")
            ignore = shutil.ignore_patterns("*.py", "__pycache__")
            shutil.copytree("configs/tiny-model", configs / "tiny-model", ignore=ignore, dirs_exist_ok=True)
            shutil.copy("configs/tiny.toml", configs)


setup(cmdclass={"build_py": BuildWithSmallModel})
