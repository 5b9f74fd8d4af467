"""A student on the hub: what arrives there, who may see it, which token is shown to whom, and what is refused."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import processes
import pytest
from absl import flags
from fake_hub import READER, TOKEN, FakeHub, Repo
from untrained import TEACHER, student_of

from radlads_jax import export
from radlads_jax.porting.model_card import named, tags, write_model_card

ROOT = pathlib.Path(__file__).parent.parent
NAME = "me/student-1"


@pytest.fixture(scope="module")
def student(tmp_path_factory: Any) -> pathlib.Path:
    """A directory with a student's card, and weights in several files."""
    directory = shutil.copytree(ROOT / "configs" / "demo_teacher", tmp_path_factory.mktemp("student") / "export")
    (directory / "README.md").write_text(write_model_card(student_of(TEACHER, "rad_rwkv7")))
    (directory / "modeling_rwkv7qwen2.py").write_text("raise NotImplementedError\n")
    for number in range(3):
        (directory / f"more-{number}.safetensors").write_bytes(os.urandom(40_000))
    return directory


@pytest.fixture
def hub(monkeypatch: Any, tmp_path: pathlib.Path) -> Iterator[FakeHub]:
    """A hub to which this process's client goes, with a token that may write."""
    with FakeHub().serving() as serving, contextlib.ExitStack() as stack:
        for name, value in {"ENDPOINT": serving.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        stack.callback(huggingface_hub.utils.close_session)
        yield serving


def push(model: pathlib.Path, *words: str, name: str = NAME) -> None:
    values = flags.FlagValues()
    export._define(values)
    values(["export", f"--model={model}", f"--push={name}", *words])
    export.main(values)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def arrived(hub: FakeHub, name: str = NAME) -> dict[str, bytes]:
    return {file: data for file, data in hub.repos[name].files.items() if file != ".gitattributes"}


def test_what_arrives_is_the_export_to_the_bit_and_private(
    hub: FakeHub, student: pathlib.Path, tmp_path, capfd
) -> None:
    push(student)
    got, expected = arrived(hub), contents(student)
    card, local = (files.pop("README.md").decode() for files in (got, expected))
    assert got == expected and sum(file.endswith(".safetensors") for file in got) > 2
    assert {"config.json", "tokenizer.json", "modeling_rwkv7qwen2.py"} <= got.keys()
    assert card == local.replace('"PATH"', f'"{NAME}"') != local
    assert hub.repos[NAME].private and hub.repos[NAME].commits == 2, "all of it in one commit"
    said = "".join(capfd.readouterr())
    assert f"{hub.url}/{NAME}" in said and "private" in said and TOKEN not in said
    asked = {token for _, path, token in hub.asked if not path.startswith("/blobs/")}
    assert asked == {TOKEN}
    assert fetched(hub, tmp_path / "again") == hub.repos[NAME].files


def fetched(hub: FakeHub, directory: pathlib.Path) -> dict[str, bytes]:
    """What another process's client gets of it, which asks the hub that HF_ENDPOINT names."""
    script = f"import huggingface_hub as h; h.snapshot_download({NAME!r}, local_dir={str(directory)!r})"
    subprocess.run([sys.executable, "-c", script], env=os.environ | hub.environ(HF_TOKEN=TOKEN), check=True)
    return contents(directory)


def test_the_command_as_a_user_gives_it(student: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """From a run's directory: nothing but HF_TOKEN and HF_ENDPOINT says who and where."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(student)
    command = [sys.executable, "-m", "radlads_jax.export", f"--model={tmp_path / 'run'}", f"--push={NAME}", "--public"]
    with FakeHub().serving() as hub:
        environ = processes.environ(**hub.environ(HF_TOKEN=TOKEN, JAX_PLATFORMS="cpu"))
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert arrived(hub).keys() == contents(student).keys()
        assert not hub.repos[NAME].private and f"public on the hub: {hub.url}/{NAME}" in done.stdout
        assert "%|" in done.stderr, "a progress bar"
        assert TOKEN not in done.stdout + done.stderr


def test_in_another_dtype(hub: FakeHub, student: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """Exported to where it is told, or for as long as it takes to send it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    push(student, "--dtype=float32")
    first = arrived(hub)
    assert len(first["model.safetensors"]) > 1.9 * len(contents(student)["model.safetensors"])
    assert not list(tmp_path.glob("radlads_jax*"))
    push(student, "--dtype=float32", f"--output={tmp_path / 'kept'}")
    kept = contents(tmp_path / "kept")
    assert arrived(hub) == first and kept["model.safetensors"] == first["model.safetensors"]


def test_an_interrupted_push_goes_on(hub: FakeHub, student: pathlib.Path, monkeypatch: Any) -> None:
    sent = len(list(student.glob("*.safetensors")))
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=rf"{NAME}.*same command"):
        patched.setattr(huggingface_hub.HfApi, "preupload_lfs_files", broken_off(1))
        push(student)
    assert arrived(hub) == {} and len(hub.blobs) == 1, "nobody meets half a model"
    hub.sent.clear()
    push(student)
    assert len(hub.sent) == sent - 1 and arrived(hub).keys() == contents(student).keys()


def broken_off(after: int) -> Any:
    """An upload of LFS files that ends in an error when so many are there."""
    upload = huggingface_hub.HfApi.preupload_lfs_files

    def some(self: Any, repo_id: str, additions: Any, **options: Any) -> None:
        large = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]
        upload(self, repo_id, large[:after], **options)
        raise OSError("the connection is gone")

    return some


def test_an_earlier_export_is_replaced_whole(hub: FakeHub, student: pathlib.Path, tmp_path: pathlib.Path) -> None:
    push(student)
    smaller = shutil.copytree(student, tmp_path / "smaller")
    for gone in ("more-1.safetensors", "generation_config.json"):
        (smaller / gone).unlink()
    (smaller / "config.json").write_text("{}")
    push(smaller)
    assert arrived(hub).keys() == contents(smaller).keys() and arrived(hub)["config.json"] == b"{}"


def test_what_is_somebody_elses_stays_unless_asked(hub: FakeHub, student: pathlib.Path) -> None:
    hub.repos[NAME] = Repo(private=True)
    hub.repos[NAME].files |= {"config.json": b"{}", "model.safetensors": b"precious", "README.md": b"# Mine\n"}
    before = dict(hub.repos[NAME].files)
    with pytest.raises(ValueError, match=rf"{NAME} holds .*model\.safetensors.*--replace"):
        push(student)
    assert hub.repos[NAME].files == before
    push(student, "--replace")
    assert arrived(hub).keys() == contents(student).keys()


@pytest.mark.parametrize(("private", "words", "wanted"), [(False, (), "private"), (True, ("--public",), "public")])
def test_a_repository_that_others_see_otherwise_than_asked(hub, student, private, words, wanted) -> None:
    hub.repos[NAME] = Repo(private)
    with pytest.raises(ValueError, match=rf"{NAME} .*\b{wanted} repository\b.*--public"):
        push(student, *words)
    assert arrived(hub) == {}


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("student", TOKEN, "ORG/NAME"),
        ("me/stu dent", TOKEN, r"stu dent"),
        ("me/a--b", TOKEN, r"me/a--b"),
        ("https://hub/me/a", TOKEN, "ORG/NAME"),
        (NAME, "", "HF_TOKEN is not set"),
        (NAME, "hf_secr\u00e9t", "HF_TOKEN is not a token"),
        ("others/student", TOKEN, r"others/student .*\bmade: .*403.*\bwrite others/student\b"),
        (NAME, READER, rf"{NAME} .*\bmade: .*403.*\bwrite {NAME}\b"),
        (NAME, "hf_secret", r"401.*HF_TOKEN"),
    ],
)
def test_what_is_refused_before_anything_is_sent(hub, student, name, token, said, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=said) as raised:
        push(student, "--dtype=bfloat16", name=name)
    assert hub.blobs == {} and hub.repos == {}
    assert not re.search(r"secr.t", str(raised.value)) and TOKEN not in str(raised.value)


def test_the_token_of_a_login_is_not_used(hub: FakeHub, student: pathlib.Path, tmp_path: pathlib.Path, monkeypatch):
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="HF_TOKEN is not set"):
        push(student)
    assert hub.asked == []


def test_a_hub_that_is_not_there(student: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match=rf"{NAME} .*\blooked at \(.*\breached\b"):
        push(student)


def test_only_students_are_pushed(hub: FakeHub, student: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"README\.md.*student"):
        push(tmp_path)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--push=me/a", "--gguf=x.gguf"), "--gguf and --push"),
        (("--gguf=gs://bucket/x.gguf",), r"--gguf is gs://bucket/x\.gguf, in a bucket; expected"),
        (("--push=me/a", "--output=gs://bucket/x"), r"gs://bucket/x.*--output"),
        (("--output=x", "--public"), "--push"),
        (("--output=x", "--replace"), "--push"),
        ((), "--push"),
    ],
)
def test_flags_that_do_not_go_together(student: pathlib.Path, words: tuple[str, ...], said: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    values = flags.FlagValues()
    export._define(values)
    values(["export", f"--model={student}", *words])
    with pytest.raises(ValueError, match=said):
        export.main(values)


def test_a_card_names_the_model_where_it_is_used(student: pathlib.Path) -> None:
    card = (student / "README.md").read_text()
    assert "radlads" in tags(card) and tags(card.replace("- radlads\n", "")).isdisjoint({"radlads"})
    assert tags("# No header\n\ntags:\n- radlads\n") == set()
    text = "A PATH.\n\n## Use\n\n    vllm serve PATH\n\n## Recipe\n\nText: PATH.\n"
    assert named(text, "me/a") == text.replace("serve PATH", "serve me/a")
