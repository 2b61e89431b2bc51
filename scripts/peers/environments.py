"""A virtual environment for each peer, made once: its own versions of everything but torch.

torch takes 5.5 GB, so it is installed once, in the environment `base`, which the others see through
a `.pth` file. What a peer asks for otherwise is in its own folder and comes first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = ("torch==2.14.1", "torchvision==0.29.1")
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "trainer": ("transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0"),
    "trl": ("trl==1.16.0", "peft==0.21.2"),
    "llamafactory": ("llamafactory==0.9.5",),
    "ms-swift": ("ms-swift==4.6.0", "qwen-vl-utils"),
}
"""What is asked for; the versions that came are in the results."""
SHOWN = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "ms-swift", "numpy")


class EnvironmentFailed(Exception):
    """An installation that did not succeed; the message is pip's last line of error."""


def prepare(folder: Path, tool: str) -> Path:
    """The interpreter of the tool's environment, made where it is not there yet."""
    shared = _make(folder / "base", TORCH, shared=None)
    wanted = (*TORCH, *REQUIREMENTS[tool])
    return _python(_make(folder / tool, wanted, shared=site_packages(shared)))


def versions(python: Path | str) -> dict[str, str]:
    """The versions of the packages that set the speed, as the environment has them."""
    code = (
        "import json; from importlib import metadata as m;"
        "found = reversed(list(m.distributions()));"  # what comes first in the path counts
        "names = {d.metadata['Name'].lower(): d.version for d in found};"
        f"print(json.dumps({{n: names[n] for n in {SHOWN!r} if n in names}}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def site_packages(environment: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def _make(environment: Path, wanted: Sequence[str], *, shared: Path | None) -> Path:
    record = environment / "requirements.json"
    if record.is_file() and json.loads(record.read_text()) == list(wanted):
        return environment
    print(f"making {environment}: {' '.join(wanted)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    if shared is not None:
        (site_packages(environment) / "zz_shared.pth").write_text(f"{shared.absolute()}\n")
    command = [str(_python(environment)), "-m", "pip", "install", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (environment / "pip.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise EnvironmentFailed(last_line(done.stderr))
    record.write_text(json.dumps(list(wanted)))
    return environment


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def last_line(text: str) -> str:
    """The last line of what a program said that is no progress bar or rule, at most 300 long."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    told = [line for line in lines if any(map(str.isalpha, line)) and "it/s]" not in line]
    errors = [line for line in told if "Error" in line or "ERROR" in line]
    return (errors or told or ["nothing was said"])[-1][:300]
