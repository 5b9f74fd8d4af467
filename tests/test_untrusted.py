"""Strangers' files run nothing: no pickle is read anywhere, no code of theirs is imported, no name leads elsewhere."""

import ast
import importlib.util
import io
import pathlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator

import fuzz_readers as readers
import pytest
from rich.console import Console

from radlads_jax.evaluation.task_code import check_task_code
from radlads_jax.evaluation.tasks import load_tasks
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.heldout import results_table

ROOT = pathlib.Path(__file__).parent.parent

# Modules that unpickle, or run what a file says.
RUNNING = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "pty"}
# Functions of a module, or built in, that do.
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
}
CALLS |= {"np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle"}
OPTIONS = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}


def sources() -> dict[str, str]:
    """The package's files but those that an export carries for torch, which are not imported here."""
    paths = [path for folder in ("radlads_jax", "pallas_kernels", "configs") for path in (ROOT / folder).rglob("*.py")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {path: text for path, text in texts.items() if not path.startswith("radlads_jax/hf/")}


def running(source: str) -> Iterator[str]:
    """What in a source could run a file's contents."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in RUNNING)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in RUNNING:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                yield ast.unparse(node.func)
            for keyword in node.keywords:
                sound = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in OPTIONS and not sound:
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def test_nothing_in_the_source_runs_what_a_file_says() -> None:
    calls = {path: list(running(text)) for path, text in sources().items()}
    assert len(calls) > 80
    assert {path: names for path, names in calls.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("import pickle", "pickle"),
        ("from dill import loads", "dill"),
        ("x = np.load(path)", "np.load"),
        ("torch.load(path)", "torch.load"),
        ("AutoModel.from_pretrained(d, trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoModel.from_pretrained(d, trust_remote_code=flag)", "trust_remote_code=flag"),
        ("AutoModel.from_pretrained(d, trust_remote_code=False)", None),
        ("model.eval()", None),
    ],
)
def test_the_look_at_the_source_finds_what_it_should(source: str, call: str | None) -> None:
    assert list(running(source)) == ([call] if call else [])


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, target: pathlib.Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.target,)


unpickled: list[str] = []
looking = False


def note(event: str, arguments: tuple) -> None:
    if looking and event == "pickle.find_class":
        unpickled.append(".".join(map(str, arguments)))


# A hook stays for the life of the process; it listens only inside the test.
sys.addaudithook(note)

FILES: dict[str, tuple[Callable[[pathlib.Path], object], str, Callable[[pathlib.Path, pathlib.Path], None]]] = {
    "weights": (readers.write_model, readers.WEIGHTS, readers.read_weights),
    "config": (readers.write_model, "config.json", readers.read_weights),
    "tokenizer": (readers.write_tokenizer, "tokenizer.json", readers.read_tokenizer),
    "tokenizer's settings": (readers.write_tokenizer, "tokenizer_config.json", readers.read_tokenizer),
    "token file": (lambda place: (place / "t.bin").write_bytes(b""), "t.idx", readers.read_token_file),
    "text": (lambda place: None, "t.txt", readers.read_documents("t.txt", "text")),
    "jsonl": (lambda place: None, "t.jsonl", readers.read_documents("t.jsonl", "jsonl")),
    "parquet": (lambda place: None, "t.parquet", readers.read_documents("t.parquet", "parquet")),
    "saved dataset": (readers.write_saved_dataset, "data-00000-of-00001.arrow", readers.read_documents(".", "hf")),
    "saved dataset's state": (readers.write_saved_dataset, "state.json", readers.read_documents(".", "hf")),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_pickle_in_the_place_of_any_file_is_refused_unread(kind: str, tmp_path: pathlib.Path) -> None:
    global looking
    make, name, read = FILES[kind]
    place, work = tmp_path / "files", tmp_path / "work"
    place.mkdir()
    work.mkdir()
    make(place)
    (place / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    unpickled.clear()
    looking = True
    try:
        with pytest.raises(ValueError, match=str(tmp_path) + r"|config\.json"):
            read(place, work)
    finally:
        looking = False
    assert unpickled == [] and not (tmp_path / "ran").exists()


def test_the_bomb_is_one(tmp_path: pathlib.Path) -> None:
    global looking
    looking = True
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    looking = False
    assert (tmp_path / "ran").exists() and unpickled


def test_a_checkpoint_of_pickles_is_no_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "stage1" / "5").mkdir(parents=True)
    for name in ("state", "data", "meta", "_CHECKPOINT_METADATA"):
        (tmp_path / "stage1" / "5" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with Checkpoints(tmp_path / "stage1") as checkpoints, pytest.raises(Exception):  # noqa: B017
        checkpoints.restore_meta(5)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"task.yaml": "task: t\nprocess_docs: !function code.run\n"},
        {"task.yaml": "include: sub/base.yaml\ntask: t\n", "sub/base.yaml": "doc_to_text: !function code.run\n"},
        {"task.yaml": "group: g\ntask: [t]\n", "beside.yaml": "task: t\ndoc_to_text: !function code.run\n"},
        {"task.yaml": 'task: t\ninclude: "../outside.yaml"\n', "../outside.yaml": "x:  !function  code.run\n"},
        {"task.yaml": "include:\n  - ../outside.yaml\n", "../outside.yaml": "x: [{y: !function code.run}]\n"},
        {"task.yaml": '"include": ../outside.yaml\n', "../outside.yaml": "x: !function code.run\n"},
    ],
    ids=["its own", "included", "beside it", "included from outside", "a list", "a quoted key"],
)
def test_python_code_of_a_task_file_runs_only_when_asked(tmp_path: pathlib.Path, files: dict[str, str]) -> None:
    place = tmp_path / "tasks"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/\S*\.yaml .*\(!function\).*--trust_task_code"):
        check_task_code([str(place / "task.yaml")])
    check_task_code(["arc_easy"])
    (place / "plain").mkdir()
    (place / "plain" / "task.yaml").write_text("task: t\ndoc_to_text: '{{text}}'\n")
    check_task_code([str(place / "plain" / "task.yaml")])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("doc_to_text: '{{ cycler.__init__.__globals__.os.getcwd() }}'", "__globals__"),
        ("metric_list: [{metric: mine/metric, hf_evaluate: true}]", "hf_evaluate"),
        ("x: !!python/object/apply:os.getcwd []", "python/object"),
        ("x: [", "is no YAML"),
        ("x: 2024-13-45", "is no YAML"),
        ("x: &a [*a, '{{ x.__class__ }}']", "__class__"),
    ],
)
def test_other_ways_to_code_are_refused(tmp_path: pathlib.Path, text: str, named: str) -> None:
    (tmp_path / "task.yaml").write_text(f"task: t\n{text}\n")
    with pytest.raises(ValueError, match=rf"task\.yaml .*{re.escape(named)}"):
        check_task_code([str(tmp_path / "task.yaml")])


def test_what_is_no_code_is_let_through(tmp_path: pathlib.Path) -> None:
    """Gaps to be filled, and aliases, of which a reader of all they hold would see no end."""
    many = "\n".join(f"y{i + 1}: &y{i + 1} [*y{i}, *y{i}]" for i in range(60))
    (tmp_path / "task.yaml").write_text(f"task: t\ndoc_to_text: '{{{{q}}}} ____.'\nx: &x [*x]\ny0: &y0 [1]\n{many}\n")
    check_task_code([str(tmp_path / "task.yaml")])


METRIC = """\
import pathlib
pathlib.Path(__file__).parent.joinpath("ran").touch()
"""
TASK = """\
task: t
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/data.jsonl}}, cache_dir: {place}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{text}"
doc_to_target: x
generation_kwargs: {{until: [x]}}
metric_list: [{{metric: {metric}}}]
"""
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `eval`)"
)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_metric_that_is_not_lm_evals_own_is_refused(tmp_path: pathlib.Path) -> None:
    """lm-eval imports it, from the hub or a file, without hf_evaluate too."""
    (tmp_path / "mine.py").write_text(METRIC)
    file = tmp_path / "task.yaml"
    for metric in (f"{tmp_path}/mine.py", "stranger/metric"):
        file.write_text(TASK.format(place=tmp_path, text="", metric=metric))
        with pytest.raises(ValueError, match=rf"task\.yaml .*{re.escape(metric)}.*--trust_task_code"):
            check_task_code([str(file)])
    file.write_text(TASK.format(place=tmp_path, text="", metric="exact_match"))
    check_task_code([str(file)])
    assert not (tmp_path / "ran").exists()


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "template", ["{{ cycler['_' ~ '_init_' ~ '_'] }}", r"{{ cycler | attr('\\x5f\\x5finit\\x5f\\x5f') }}"]
)
def test_a_template_reaches_nothing_by_a_name_put_together(tmp_path: pathlib.Path, template: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"q": "Who?"}\n')
    file = tmp_path / "task.yaml"
    file.write_text(TASK.format(place=tmp_path, text=template, metric="exact_match"))
    check_task_code([str(file)])
    with pytest.raises(ValueError, match=r"task\.yaml can not be read \(access to attribute '__init__' .* is unsafe"):
        load_tasks([str(file)])


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trusted_file_that_is_no_yaml_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "task.yaml").write_text("task: [t\n")
    with pytest.raises(ValueError, match=r"task\.yaml can not be read"):
        load_tasks([str(tmp_path / "task.yaml")])


def test_samples_say_nothing_to_the_terminal() -> None:
    """Neither colours, titles and links, nor rich's own markup."""
    hostile = "\x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]b[/bold] \x9b2J"
    sample = {"prompt": hostile, "teacher": hostile, "student": hostile}
    scores = {"loss": 1.0, "top1": 0.5}
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(results_table({"stages": [], "tokens": 1, "student": scores, "samples": [sample]}))
    said = console.file.getvalue()
    assert said.count("\\x1b[31mred\\x1b[0m \\x1b]0;title\\x07 [bold]b[/bold] \\x9b2J") == 3
    assert not set(said) & {"\x1b", "\x07", "\x9b"}
