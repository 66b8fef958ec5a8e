"""Makes an environment in which some packages have other versions than in this one; `make compat` runs the tests in it.

All else comes from this environment, through the second one's path: its 11 GB are not installed twice. Programs that
the tests start, such as servers, notebooks and Ray's workers, run with the second environment's Python too.

    .venv/bin/python tools/second_environment.py .compat torchrl-nightly tensordict-nightly

Knows nothing of the packages, except that they must be the ones that a program then imports.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What every new environment has, and this project, which is tested and not replaced.
NOT_UNDER_TEST = {"pip", "setuptools", "wheel", "torchrl-sglang-hidden"}


def make(directory: Path, requirements: list[str]) -> None:
    """Make the environment anew, and hold it to its purpose.

    Args:
        directory: where; what is there is removed.
        requirements: as for pip. What they require themselves is not installed: versions that they do not accept can
            be tried too.

    Raises:
        SystemExit: a package is not the one that is imported.
        subprocess.CalledProcessError: pip found no such version.
    """
    if directory.exists() and not (directory / "pyvenv.cfg").exists():
        raise SystemExit(f"{directory} is no environment, and would be removed; name another directory")
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    # Before this environment is on the path: pip would take its packages for installed ones.
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps"]
    subprocess.run([*command, "-e", str(ROOT), *requirements], check=True)
    site = site_of(directory)
    for distribution in under_test(site):
        for name in modules_of(distribution):
            # A nightly build has another name. Who asks for the version of its module would get this environment's.
            if name != distribution.name:
                alias = site / f"{name}-{distribution.version}.dist-info"
                alias.mkdir()
                (alias / "METADATA").write_text(
                    f"Metadata-Version: 2.1\nName: {name}\nVersion: {distribution.version}\n"
                )
    behind = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (site / "first_environment.pth").write_text(behind, encoding="utf-8")
    subprocess.run([python, __file__, "--check", directory.resolve()], check=True)


def site_of(directory: Path) -> Path:
    """Return where an environment keeps its packages."""
    return directory / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def under_test(site: Path) -> list[importlib.metadata.Distribution]:
    """List the distributions that were installed to be tested."""
    found = importlib.metadata.distributions(path=[str(site)])
    return [distribution for distribution in found if distribution.name not in NOT_UNDER_TEST and distribution.files]


def check(directory: Path) -> None:
    """Import what was installed into the running environment, and print its versions.

    Args:
        directory: of the environment.

    Raises:
        SystemExit: nothing was installed, or something else is imported in its stead.
    """
    site = site_of(directory)
    tested = under_test(site)
    if not tested:
        raise SystemExit(f"{directory} has no packages of its own; name some, such as tensordict==0.15.3")
    for distribution in tested:
        for name in modules_of(distribution):
            file, version = Path(importlib.import_module(name).__file__ or ""), importlib.metadata.version(name)
            if not file.is_relative_to(site) or version != distribution.version:
                raise SystemExit(
                    f"{distribution.name} {distribution.version} was installed, and {name} {version} of {file} is "
                    "imported"
                )
            print(f"under test: {distribution.name} {version}, imported as {name} from {file.parent}")


def modules_of(distribution: importlib.metadata.Distribution) -> list[str]:
    """List the packages that a distribution brings.

    Raises:
        SystemExit: there are none, so that nothing could be checked.
    """
    files = distribution.files or ()
    names = sorted(file.parts[0] for file in files if len(file.parts) == 2 and file.name == "__init__.py")
    if not names:
        raise SystemExit(f"{distribution.name} {distribution.version} brings no package that could be imported")
    return names


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="hold the running environment to its packages")
    parser.add_argument("directory", type=Path)
    parser.add_argument("requirements", nargs="*", metavar="requirement")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.directory)
    else:
        make(arguments.directory, arguments.requirements)


if __name__ == "__main__":
    main()
