"""Dockerfile and docker-compose.yml, by parsing: no engine runs here.

Rules, most of them hadolint's: D1 every base image has a tag that is not "latest"; D2 no ADD, no sudo, no `apt-get install`; D3 pip caches
nothing; D4 ENTRYPOINT, CMD and HEALTHCHECK are in exec form; D5 the last USER is not root; D6 what is copied exists and is not ignored;
D7 the driver's compute and utility libraries are asked for; D8 only one of each of ENTRYPOINT, CMD, HEALTHCHECK; D9 WORKDIR is absolute;
D10 every IMEX_ variable is one that the program knows; D11 every imex-persist command parses.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from imex_persist.cli import _parser
from imex_persist.front import settings

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").is_file(), reason="not in a checkout")
KNOWN = "ARG FROM WORKDIR COPY RUN ENV USER VOLUME HEALTHCHECK ENTRYPOINT CMD".split()


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continuation lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def every(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def parses(words: list[str]) -> None:
    assert words[0] == "imex-persist"
    _parser().parse_args(words[1:])


def test_dockerfile_rules():
    assert all(name in KNOWN for name, _ in instructions())  # D2: no ADD
    for image in every("FROM"):
        assert re.match(r"\S+:(?!latest)\S+", image), image
    for command in every("RUN"):
        assert not re.search(r"\bsudo\b|apt-get install", command)
        assert "pip " not in command or "--no-cache-dir" in command
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        (rest,) = every(name)
        assert isinstance(json.loads(rest[rest.index("[") :]), list)
    assert every("USER")[-1] not in ("root", "0")
    assert all(path.startswith("/") for path in every("WORKDIR"))


def test_what_is_copied_is_there():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for rest in every("COPY"):
        *sources, _ = (word for word in rest.split() if not word.startswith("--"))
        for source in sources:
            assert source in allowed
            assert (ROOT / source).exists() or source == "README.md"  # written last


def test_the_image_asks_for_the_driver_and_sets_known_variables():
    (environment,) = every("ENV")
    values = dict(word.split("=", 1) for word in shlex.split(environment))
    assert {"compute", "utility"} <= set(values["NVIDIA_DRIVER_CAPABILITIES"].split(","))
    settings.from_environment({name: value for name, value in values.items() if name.startswith("IMEX_")})


def test_commands_of_the_image_parse():
    (entry,), (command,), (health,) = every("ENTRYPOINT"), every("CMD"), every("HEALTHCHECK")
    parses(json.loads(entry) + json.loads(command))
    parses(json.loads(health[health.index("[") :]))


def test_compose():
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = data["services"]["imex"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 4, ["gpu"])
    assert service["ipc"] == "host" and service["shm_size"] == "1gb" and service["init"] is True
    assert service["ulimits"]["memlock"] == -1
    assert service["healthcheck"]["test"][0] == "CMD"
    parses(service["healthcheck"]["test"][1:])
    (script,) = service["command"]
    parses(script.split(" && ")[0].split())
    environment = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in service["environment"].items()}
    values = settings.from_environment(environment)
    assert {name: value.value for name, value in values.items()} == {"tensor_parallel_size": 4}
    named = {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith("$")}
    assert named == set(data["volumes"])
