"""What MODEL may be, and the sentence for what it may not."""

import errno
import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import httpx

from resprune.exporter.checkpoint import checkpoint, hub
from resprune.exporter.checkpoint.checkpoint import family_of, require_model, resolve
from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.errors import ResPruneError


def directory(root: Path, config: object) -> Path:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return root


def test_a_directory(tmp_path):
    found = resolve(str(directory(tmp_path / "mine", {"model_type": "llava"})))
    assert (found.name, found.revision, family_of(found).name) == ("mine", None, "llava")


def test_an_unknown_alias_lists_the_known_ones():
    with pytest.raises(
        ResPruneError, match=r"nonsense is not a directory, a hub id .* or one of demo, llava15, "
    ):
        resolve("nonsense")


@pytest.mark.parametrize(
    "name",
    [
        "./missing",
        "/missing/too",
        "a/b/c",
        "~/x",
        "owner/",
        "my models/llava",
        "a/b--c",
        "a/b.git",
        f"a/{97 * 'b'}",
    ],
)
def test_a_missing_directory_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ResPruneError, match="is not a directory, a hub id"):
        resolve(name)


@pytest.mark.parametrize("name", [None, "demo"])
def test_a_revision_is_for_the_hub(name, tmp_path):
    with pytest.raises(ResPruneError, match="--revision is for a hub id"):
        resolve(name or str(directory(tmp_path, {})), revision="main")


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ResPruneError, match=r"has no config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000], ids=["cut off", "a list", "nested"])
def test_a_config_that_does_not_parse(text, tmp_path):
    with pytest.raises(ResPruneError, match=r"config\.json .*; download it again"):
        resolve(str(directory(tmp_path, text)))


@pytest.mark.parametrize("model_type", ["llama", None, ["llava"]])
def test_another_family_is_refused_with_a_list(model_type, tmp_path):
    found = resolve(str(directory(tmp_path, {"model_type": model_type})))
    with pytest.raises(ResPruneError, match=r"not supported; supported are LLaVA-1\.5 \(llava\)"):
        family_of(found)


def test_a_quantized_checkpoint_is_refused(tmp_path):
    found = resolve(str(directory(tmp_path, {"model_type": "llava", "quantization_config": {}})))
    with pytest.raises(ResPruneError, match="is quantized"):
        family_of(found)


def test_demo_is_found_in_a_checkout_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint, "__file__", str(tmp_path / "site-packages" / "exporter" / "checkpoint.py")
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResPruneError, match="run this inside a checkout"):
        resolve("demo")
    (tmp_path / "demo" / "model").mkdir(parents=True)
    directory(tmp_path / "demo" / "model", {"model_type": "llava"})
    below = tmp_path / "demo" / "data"
    below.mkdir()
    monkeypatch.chdir(below)
    assert resolve("demo").name == "demo"


@pytest.fixture
def hub_there(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda repository, revision: None)


def test_an_alias_is_downloaded_and_its_commit_recorded(tmp_path, monkeypatch, hub_there):
    asked = []

    def snapshot(repository, *, revision, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append((repository, revision, allow_patterns))
        return str(directory(tmp_path / "0123abc", {"model_type": "llava"}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = resolve("llava15", revision="main")
    assert (found.name, found.revision) == ("llava15", "0123abc")
    assert asked[0][:2] == ("llava-hf/llava-1.5-7b-hf", "main")
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked[0][2]), (
        "no pickles are fetched"
    )


def test_a_snapshot_in_the_cache_is_used_without_the_hub(tiny_checkpoint, tmp_path, monkeypatch):
    """As the hub's cache lays it out: files are links into blobs/, and the branch is a file with the commit's name."""
    commit, cache = "0123abcd" * 5, tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny_checkpoint("siglip-mistral").iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        found = resolve("owner/name", revision=revision)
        assert (found.name, found.revision) == ("owner/name", commit)
    assert len({tensor.file.name for tensor in found.weights.values()}) == 3, (
        "shards, by the names of the links"
    )
    bundle = export("owner/name", tmp_path / "out", Options(k=4))
    assert read_bundle(bundle).manifest.revision == commit
    assert not [path for path in bundle.rglob("*") if path.is_symlink()], "nothing points into the cache"


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("no", response=httpx.Response(403, request=httpx.Request("GET", "https://hub.example")))
    return kind("no")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.GatedRepoError, "is gated: accept its terms .* log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the hub has no owner/name"),
        (errors.RevisionNotFoundError, "has no revision main"),
        (errors.LocalEntryNotFoundError, "could not be reached .* give its directory as MODEL"),
        (errors.OfflineModeIsEnabled, "could not be reached .* give its directory as MODEL"),
        (errors.HfHubHTTPError, "could not be reached .* give its directory as MODEL"),
        (ConnectionError, "could not be reached .* give its directory as MODEL"),
        (httpx.ConnectError, "could not be reached .* give its directory as MODEL"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(error, sentence, monkeypatch, hub_there):
    def snapshot(*arguments, **keywords):
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ResPruneError, match=sentence):
        resolve("owner/name", revision="main")


def test_a_full_disk_while_downloading_is_not_taken_for_the_network(monkeypatch, hub_there):
    def snapshot(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ResPruneError, match="the disk is full"):
        resolve("owner/name")


@pytest.fixture
def port(monkeypatch):
    """A port of this machine that the hub is looked for at; nobody listens there yet."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        huggingface_hub.close_session()  # which may have read another environment
        yield bound
    huggingface_hub.close_session()


@pytest.mark.parametrize("ask", [resolve, require_model])
@pytest.mark.parametrize("revision", [None, "0" * 40])
def test_a_hub_that_is_not_there_is_told_at_once(ask, revision, port, capfd):
    with pytest.raises(ResPruneError, match=r"not be reached for owner/name \(ConnectError: .* as MODEL"):
        ask("owner/name", revision=revision)
    assert "Retrying" not in capfd.readouterr().err


def test_a_hub_that_does_not_answer_is_not_waited_for(port, monkeypatch):
    port.listen()
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    with pytest.raises(ResPruneError, match=r"not be reached for owner/name \(.* as MODEL"):
        resolve("owner/name")
