"""The shipped cluster descriptions are ones that Ray and Kubernetes take, and hold no secret."""

import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package
from ray.autoscaler._private.util import prepare_config, validate_config

import udp_ray

REPOSITORY = Path(udp_ray.__file__).parent.parent
CLUSTER = REPOSITORY / "cluster.yaml"
DEPLOY = REPOSITORY / "deploy"
SHARED = "/shared"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read(CLUSTER)


def read(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(file.read_text())
    return loaded


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert found is not None
    return found[1]


# ---- ray up


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_misspelt_one(cluster: dict[str, Any]) -> None:
    cluster["max_worker"] = cluster.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError):
        validate_config(cluster)


@pytest.mark.parametrize(
    "file", [CLUSTER, *sorted(DEPLOY.iterdir())], ids=lambda file: str(file.name)
)
def test_it_holds_no_secret(file: Path) -> None:
    assert not SECRET.search(file.read_text())


SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|(secret|password|_token)\S*[:=] *[^\s${~]|BEGIN [A-Z ]*KEY|[0-9a-f]{32}",
    re.IGNORECASE,
)


@pytest.mark.parametrize("text", ["password: abc", "RAY_AUTH_TOKEN=abc", "AKIA" + "0" * 16])
def test_the_search_for_secrets_finds_them(text: str) -> None:
    assert SECRET.search(text)


def test_every_node_ends_with_the_tested_versions_and_an_environment_that_imports(
    cluster: dict[str, Any],
) -> None:
    commands = cluster["setup_commands"]
    assert any("make env HAS_GPU=1" in command for command in commands)  # one build of torch
    assert "import" in commands[-1]
    assert "udp_ray" in commands[-1]


def test_every_node_mounts_the_shared_folder_before_anything_else(cluster: dict[str, Any]) -> None:
    mount = next(text for text in cluster["initialization_commands"] if "mount -t nfs4" in text)
    assert mount.startswith(f"sudo mkdir -p {SHARED}")
    assert f"mountpoint -q {SHARED}" in mount  # a node that starts again must not mount it twice


def test_every_node_has_the_token_and_asks_for_it(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert starts
        assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in starts)


def test_no_training_worker_lands_beside_the_accountant(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert sum(kind["resources"].get("GPU", 0) for kind in cluster["available_node_types"].values())


# ---- Kubernetes


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_kubernetes_cluster_runs_the_tested_versions_behind_a_token() -> None:
    cluster = read(DEPLOY / "raycluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert cluster["spec"]["rayVersion"] == pinned("ray")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["image"].endswith(tag())
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": SHARED, "memory": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["securityContext"]["runAsNonRoot"]
    head, gpu = cluster["spec"]["headGroupSpec"], pods(cluster)[1]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def tag() -> str:
    return f"udp-ray:ray-{pinned('ray')}-torch-{pinned('torch')}"


def test_the_kubernetes_job_runs_a_job_that_is_in_the_image_on_that_cluster() -> None:
    job, cluster = read(DEPLOY / "rayjob.yaml"), read(DEPLOY / "raycluster.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    python, script, option, settings = job["spec"]["entrypoint"].split()
    assert (python, option) == ("python", "--config")
    assert settings.startswith(f"{SHARED}/")
    (container,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert container["image"].endswith(tag())
    recipe = (DEPLOY / "Containerfile").read_text()
    folder = re.search(r"^WORKDIR (\S+)$", recipe, re.M)
    assert folder is not None
    assert (REPOSITORY / Path(script).relative_to(folder[1])).is_file()
    assert job["spec"]["backoffLimit"] == 0  # a second driver is the user's to start, by --resume


def test_the_image_has_the_pins_and_all_that_it_copies_is_there() -> None:
    recipe = (DEPLOY / "Containerfile").read_text()
    assert tag() in recipe
    installs = re.findall(r"pip install .*", recipe)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)
    for line in re.findall(r"^COPY (.*) \S+$", recipe, re.M):
        assert all((REPOSITORY / name).exists() for name in line.split()), line


# ---- what a submitted job uploads


def packed(folder: Path, target: Path) -> dict[str, int]:
    """Packs a folder as `ray job submit --working-dir` does; returns the files and their sizes."""
    create_package(str(folder), target, include_gitignore=True, logger=logging.getLogger("quiet"))
    with zipfile.ZipFile(target) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}


def test_what_a_job_uploads_is_small_and_whole(tmp_path: Path) -> None:
    files = packed(REPOSITORY, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < GCS_STORAGE_MAX_SIZE / 20
    for needed in ("jobs/train.py", "udp_ray/on_ray/train.py", "demo/model/model.safetensors"):
        assert needed in files
    assert any(name.startswith("demo/data/") and name.endswith(".parquet") for name in files)


def test_environments_outputs_ledgers_and_peoples_text_stay_behind(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(REPOSITORY / ".rayignore", project)
    shutil.copy(REPOSITORY / ".gitignore", project)
    private = [
        ".venv/bin/python", ".git/config", "runs/first/model.safetensors", "build/demo/x",
        "stores/chats/shard-00000.bin", "ledger.sqlite", "deep/ledger.sqlite-wal",
        "chats/1.parquet",
    ]  # fmt: skip
    for name in [*private, "jobs/configs/chats.yaml"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    files = packed(project, tmp_path / "package.zip")
    assert "jobs/configs/chats.yaml" in files
    assert not files.keys() & set(private)
