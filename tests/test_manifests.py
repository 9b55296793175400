"""Dockerfile, compose.yaml and the Kubernetes manifest against the code that they start.

What can be known without Docker: commands and flags parse, ports and probes exist, paths are the
image's, memory and times suffice. tests/server/test_image.py runs what the Dockerfile makes.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import dockerfile
import pytest
import yaml
from torch.distributed.run import get_args_parser

from gllm_client.__main__ import make_parser
from gllm_client.flags import dashed, struct_values
from gllm_client.supervisor import KILL_AFTER_S
from gllm_client.tritonserver import EXIT_TIMEOUT_S, SHM_BYTES, Serving
from gllm_engine import EngineConfig, make_config
from gllm_engine.runner import cache_dirs
from gllm_engine.workers import worker

ROOT = dockerfile.ROOT
K8S = ROOT / "docker/k8s"
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["gllm"]
MANIFESTS = list(yaml.safe_load_all((K8S / "two-nodes.yaml").read_text()))
TEMPLATE = MANIFESTS[0]["spec"]["leaderWorkerTemplate"]
LEADER, WORKER = (TEMPLATE[f"{role}Template"]["spec"] for role in ("leader", "worker"))
PODS = [pytest.param(LEADER, id="leader"), pytest.param(WORKER, id="worker")]
# What Kubernetes and LeaderWorkerSet put in place of $(NAME).
GIVEN = {"POD_IP": "10.0.0.1", "LWS_LEADER_ADDRESS": "gllm-0.gllm.default", "LWS_GROUP_SIZE": "2"}
GIVEN |= {"NODE_RANK": "1"}
MIN_SHM = 1 << 30  # with 64 MiB, Docker's default, 64 prompts of 1 MB do not fit


def gllm(words: list[str]) -> argparse.Namespace:
    """A command line of `gllm`, parsed as the command does."""
    assert words[0] == "gllm"
    return make_parser().parse_args(dashed(words[1:]))


def check_serve(words: list[str], model: Path) -> tuple[Serving, EngineConfig]:
    """Parse `gllm serve ...` and check all of its values, with `model` in place of its path."""
    options = gllm(words)
    assert words[1] == "serve"
    engine = struct_values(options, EngineConfig)
    serving = Serving(path=options.path, engine=engine, **struct_values(options, Serving))
    return serving, make_config({"model": str(model)} | engine)


def check_torchrun(words: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Parse `torchrun ... -m gllm_engine.worker ...`, both halves."""
    assert words[0] == "torchrun"
    run = get_args_parser().parse_args(words[1:])
    assert run.module and run.training_script == worker.main.__module__.replace("workers.", "")
    return run, worker._parser().parse_args(run.training_script_args)


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def words(pod: dict[str, Any]) -> list[str]:
    each = container(pod)
    return [
        re.sub(r"\$\((\w+)\)", lambda found: GIVEN[found[1]], word)
        for word in (*each["command"], *each["args"])
    ]


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_the_image_serves_what_it_holds() -> None:
    path = dockerfile.command()[2]
    copied = [rest.split("cp -r ")[1].split() for _, rest in dockerfile.instructions("RUN")]
    assert ["/opt/gllm-triton/model_repository", path] in copied
    serving, _ = check_serve(dockerfile.command(), ROOT)
    assert serving.host == "0.0.0.0" and str(serving.path) == path
    ports = {serving.http_port, serving.grpc_port, serving.metrics_port}
    assert dockerfile.exposed_ports() == ports


def test_the_image_keeps_compiled_kernels_in_one_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in dockerfile.environment().items():
        monkeypatch.setenv(key, value)
    assert [path.parts[1] for path in cache_dirs()] == ["cache", "cache"]


def test_commands_in_the_dockerfiles_comments() -> None:
    comments = re.findall(r"^#(.*)$", dockerfile.DOCKERFILE.read_text(), re.MULTILINE)
    text = "\n".join(comments).replace("\\\n", " ")
    runs = [shlex.split(line) for line in text.splitlines() if "docker run" in line]
    assert len(runs) == 2
    for run in runs:
        end = run.index("gllm-triton")
        for flag, value in zip(run, run[1:end], strict=False):
            if flag == "--shm-size":
                assert value == "1g"
            if flag == "-p":
                assert value == COMPOSE["ports"][0]
        if run[end + 1 :]:
            assert gllm(run[end + 1 :]).model == Path("/models/NAME/1/model.json")
    assert (
        "--build-arg EXTRA=[gpu]" in text and "\ngpu = [" in (ROOT / "pyproject.toml").read_text()
    )


def test_compose() -> None:
    here = ROOT / "docker"
    context = (here / COMPOSE["build"]["context"]).resolve()
    assert context == ROOT and (context / COMPOSE["build"]["dockerfile"]) == dockerfile.DOCKERFILE
    assert COMPOSE["shm_size"] == "1g" and SHM_BYTES < MIN_SHM
    low, high = (int(port) for port in COMPOSE["ports"][0].split(":")[1].split("-"))
    assert COMPOSE["ports"] == [f"127.0.0.1:{low}-{high}:{low}-{high}"]
    assert set(range(low, high + 1)) == dockerfile.exposed_ports()
    assert seconds(COMPOSE["stop_grace_period"]) > EXIT_TIMEOUT_S + KILL_AFTER_S
    models, kernels = (volume.split(":") for volume in COMPOSE["volumes"])
    assert (here / models[0]).resolve().is_dir() and models[1] == dockerfile.command()[2]
    assert kernels[1] == dockerfile.environment()["FLASHINFER_WORKSPACE_BASE"]


def test_the_leader_serves(tmp_path: Path) -> None:
    serving, config = check_serve(words(LEADER), tmp_path)
    assert str(serving.path) in {mount["mountPath"] for mount in container(LEADER)["volumeMounts"]}
    assert config.nnodes == TEMPLATE["size"]
    assert (
        config.num_ranks
        == config.nnodes * container(LEADER)["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert LEADER["terminationGracePeriodSeconds"] > serving.exit_timeout_s + KILL_AFTER_S
    ports = {port["name"]: port["containerPort"] for port in container(LEADER)["ports"]}
    assert ports == {
        "http": serving.http_port, "grpc": serving.grpc_port, "metrics": serving.metrics_port
    }  # fmt: skip
    probe = container(LEADER)["readinessProbe"]["httpGet"]
    assert probe == {"path": "/v2/health/ready", "port": "http"}  # KServe's, as Triton serves it


def test_the_worker_joins_the_leader(tmp_path: Path) -> None:
    _, config = check_serve(words(LEADER), tmp_path)
    run, joins = check_torchrun(words(WORKER))
    assert int(run.nproc_per_node) == config.num_ranks // config.nnodes
    assert int(run.nproc_per_node) == container(WORKER)["resources"]["limits"]["nvidia.com/gpu"]
    assert joins.engine == f"tcp://{GIVEN['LWS_LEADER_ADDRESS']}:{config.master_port}"
    assert (int(joins.node_rank), int(joins.nnodes)) == (1, config.nnodes)
    assert joins.cluster_key_file == config.cluster_key_file


@pytest.mark.parametrize("pod", PODS)
def test_what_a_pod_is_given(pod: dict[str, Any]) -> None:
    each = container(pod)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in each["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory" and mounts["shm"] == "/dev/shm"
    size = re.fullmatch(r"(\d+)Gi", volumes["shm"]["emptyDir"]["sizeLimit"])
    assert size and int(size[1]) << 30 >= MIN_SHM
    assert volumes["key"]["secret"]["defaultMode"] & 0o077 == 0  # else the key is refused
    assert mounts["cache"] == dockerfile.environment()["FLASHINFER_WORKSPACE_BASE"]
    key_file = next(word for word in words(pod) if word.startswith("--cluster-key-file="))
    assert key_file == f"--cluster-key-file={mounts['key']}/key"
    named = set(re.findall(r"\$\((\w+)\)", " ".join((*each["command"], *each["args"]))))
    given = {variable["name"] for variable in each["env"]} | {
        name for name in GIVEN if "LWS_" in name
    }
    assert named <= given


def test_services_and_policies_name_ports_and_pods_that_are_there() -> None:
    service, policy = MANIFESTS[1], MANIFESTS[2]
    ports = {port["name"]: port["containerPort"] for port in container(LEADER)["ports"]}
    labels = TEMPLATE["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    for port in service["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    for role in ("leader", "worker"):
        assert chosen <= TEMPLATE[f"{role}Template"]["metadata"]["labels"].items()
    opened = [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())]
    assert set(opened) == ports.keys()


def test_commands_in_the_guide_to_several_machines(tmp_path: Path) -> None:
    page = (ROOT / "docs/several-machines.md").read_text()
    blocks = re.findall(r"```bash.*?\n(.*?)```", page, re.DOTALL)
    commands = [
        shlex.split(line, comments=True)
        for text in blocks
        for line in text.replace("\\\n", " ").splitlines()
    ]
    serve = [line for line in commands if line[:2] == ["gllm", "serve"]]
    assert len(serve) == 2
    configs = [check_serve(line, tmp_path)[1] for line in serve]
    assert (configs[1].nnodes, configs[1].num_ranks) == (2, 16)
    (torchrun,) = [line for line in commands if "torchrun" in line]
    run, joins = check_torchrun(torchrun[torchrun.index("torchrun") :])
    assert int(run.nproc_per_node) == 8 and int(joins.nnodes) == 2
    assert joins.engine == f"tcp://{configs[1].master_addr}:{configs[1].master_port}"
    for line in commands:
        if line[0] == "kubectl" and "-f" in line:
            assert (ROOT / line[line.index("-f") + 1]).is_file()
