"""What pyproject.toml cannot say: folders of the checkout that travel inside of the package.

conf/ and results/paper/ stay where people look for them; in a wheel they lie in proxytune/shipped,
where `proxytune.files.shipped` finds them.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

SHIPPED = ("conf", "results/paper")

packages = find_namespace_packages(include=["proxytune*", "tasks*", "hydra_plugins*"])
folders = {}
for top in SHIPPED:
    for folder in (Path(top), *Path(top).rglob("*")):
        if folder.is_dir():
            folders[f"proxytune.shipped.{'.'.join(folder.parts)}"] = str(folder)

setup(
    packages=[*packages, *folders],
    package_dir=folders,
    package_data={
        "proxytune": ["loading/templates/*.jinja", "results/page_assets/*", "harness/tasks/*.yaml"],
        **{folder: ["*.yaml", "*.csv"] for folder in folders},
    },
)
