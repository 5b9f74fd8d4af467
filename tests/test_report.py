"""The report page: every chart is there and shows the run's numbers, and whatever the run brings stays text."""

import json
import math
import pathlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest
from absl import flags

from radlads_jax import report
from radlads_jax.config import defaults
from radlads_jax.reporting import charts as chart_module
from radlads_jax.reporting import sections
from radlads_jax.reporting.charts import Curve, line_chart
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.system import command

HOSTILE = '</pre><script>document.title="broken"</script><img src=x onerror=alert(1)>&amp;"\''
VOID = {"meta", "br", "img"}
STEPS = {"stage1": 12, "stage2": 9, "stage3": 4}
BAD_STEP = 5
TASK = {
    "metric": "acc",
    "filter": "strict-match",
    "chance": 0.25,
    "relative": 0.9,
    "published": {"teacher": 0.7, "student": 0.65, "relative": 0.8},
}
TASK |= {"student": {"score": 0.61, "stderr": 0.012, "documents": 300}, "teacher": {"score": 0.65, "stderr": None}}
PROBES = {
    "passkey": {"lengths": [512, 4096, 32768], "accuracy": [1.0, 0.5, 0.0]},
    "loss_by_position": {"positions": [float(64 << i) for i in range(8)], "loss": [3.0 - i / 4 for i in range(8)]},
}
EVALUATION = {
    "tasks": {HOSTILE: TASK, "wikitext": {"metric": "ppl", "chance": None, "student": {"score": 12.5, "stderr": None}}},
    "mean_relative": 0.9,
    "relative_tasks": 1,
    "limit": 0.1,
    "published_model": "QRWKV7-7B",
    "published_teacher": "Qwen2.5-7B-Instruct",
    "probes": {"teacher": PROBES, "student": PROBES},
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tree(HTMLParser):
    """Elements as (tag, attributes, path of tags around it), the text of each section, and whether all tags close."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text: dict[str, str] = {}
        self.section = "head"
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "section":
            self.section = attributes["id"] or ""
        self.elements.append((tag, attributes | {"section": self.section}, tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs) | {"section": self.section}, tuple(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    def count(self, tag: str, section: str, kind: str = "") -> int:
        return sum(
            t == tag and a["section"] == section and (not kind or kind in (a.get("class") or "").split())
            for t, a, _ in self.elements
        )


def config_dict() -> dict[str, Any]:
    config = defaults()
    config.teacher.path = f"models/{HOSTILE}"
    config.student.attention_layers = (1,)
    config.data.path = HOSTILE
    config.train.sample_prompts, config.train.log_every = (HOSTILE,), 2
    for name, steps in STEPS.items():
        config[name].batch_size, config[name].seq_len, config[name].tokens = 4, 32, 128 * steps
    return json.loads(json.dumps(config.to_dict()))


def log_stage(workdir: pathlib.Path, name: str, steps: int) -> None:
    with MetricsLogger(workdir) as logger:
        logger.begin(name, 0, STEPS[name], tokens_per_step=128)
        for step in range(1, steps + 1):
            loss = math.nan if (name, step) == ("stage2", BAD_STEP) else 4.0 / step
            values = {"loss": loss, "grad_norm": 2 * loss, "finite": float(math.isfinite(loss))}
            values |= {"lr_mixer": 1e-3 / step, "lr_rest": 1e-5}
            if name == "stage1":
                values["layer_loss"] = [0.5 / step, 1.0 / step, 2.0 / step]
            logger.log(name, step, values)


def space_times(workdir: pathlib.Path) -> None:
    """Gives the records the times of a run that takes 0.25 s a step and writes two lines at once, or what is left."""
    path = workdir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = {record["stage"]: record["step"] for record in records}
    for record in records:
        step = record["step"]
        record["time"] = 1000 + 0.25 * min(step + step % 2, last[record["stage"]]) - 1e-4 * (step % 2)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def unfinished(tmp_path: pathlib.Path) -> pathlib.Path:
    """A work directory in the middle of stage 2."""
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    log_stage(tmp_path, "stage1", 12)
    log_stage(tmp_path, "stage2", 7)
    space_times(tmp_path)
    return tmp_path


@pytest.fixture
def finished(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    for name, steps in STEPS.items():
        log_stage(tmp_path, name, steps)
    space_times(tmp_path)
    summary = {
        "student": {"loss": 1.25, "top1": 0.5, "kl": 0.1234, "agreement": 0.75},
        "teacher": {"loss": 1.125, "top1": 0.625},
        "relative_top1": 0.8,
        "tokens": 5000,
        "samples": [{"prompt": HOSTILE, "teacher": "four, six, eight", "student": f"four, six{HOSTILE}"}],
        "stages": [
            {"name": name, "seconds": 1800.0, "tokens_per_second": 4321.0, "peak_bytes": 2.5e9} for name in STEPS
        ],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path


def page(workdir: pathlib.Path, **options: Any) -> tuple[str, Tree]:
    html = sections.write_report(workdir, **options).read_text(encoding="utf-8")
    return html, Tree(html)


def command_line(*arguments: str) -> int:
    """The exit code of the report's command line."""
    values = flags.FlagValues()
    report.define_flags(values)
    values(["report", *arguments])
    return command.guarded(report.main, values)


def test_every_chart_is_there(finished: pathlib.Path) -> None:
    _, tree = page(finished)
    assert tree.count("path", "loss", "line") - tree.count("path", "loss", "mark") == 3 + 1, "the gap parts stage 2"
    assert tree.count("path", "loss", "mark") == 1
    assert tree.count("path", "rates", "line") == 3 * 2
    assert tree.count("path", "gradient", "line") == 3 + 1
    assert tree.count("path", "throughput", "line") == 3
    assert tree.text["memory"].count("2.5 GB") == 3
    assert tree.count("path", "alignment", "line") == 2
    assert tree.count("rect", "alignment", "over") == 3
    assert tree.count("path", "evaluation", "line") == 2 * 2
    anchors = [a["id"] for t, a, _ in tree.elements if t == "section"]
    links = [a["href"] for t, a, _ in tree.elements if t == "a"]
    assert links == [f"#{anchor}" for anchor in anchors] and len(set(anchors)) == len(anchors) == 12


def test_numbers_of_a_finished_run(finished: pathlib.Path) -> None:
    _, tree = page(finished, usd_per_hour=12.0)
    assert "finished" in tree.text["head"]
    for figure in ("80.0%", "0.1234", "75.0%", "1 h 30 min"):
        assert figure in tree.text["head"]
    assert "1.1250" in tree.text["quality"] and "62.5%" in tree.text["quality"] and "5K" in tree.text["quality"]
    for figure in (
        "61.0% ± 1.2",
        "65.0%",
        "90.0%",
        "80.0%",
        "QRWKV7-7B, made of Qwen2.5-7B-Instruct",
        "12.5",
        "32,768",
        "acc, strict-match",
        "of 1 tasks",
        "first 10% of the",
    ):
        assert figure in tree.text["evaluation"]
    assert "12 / 12" in tree.text["stages"] and "4,321" in tree.text["stages"]
    assert re.search(rf"stage2\s*1\s*{BAD_STEP}\D", tree.text["skipped"])
    assert "USD 18.00" in tree.text["memory"]
    assert "attention_layers: 1" in tree.text["recipe"]
    # Layer 1 stays softmax attention, so that the three errors are those of layers 0, 2 and 3.
    assert "layer 3: 2 first, 0.167 now" in tree.text["alignment"]
    assert "layer 1:" not in tree.text["alignment"]


def test_what_the_run_brings_is_text(finished: pathlib.Path) -> None:
    html, tree = page(finished)
    tags = {tag for tag, _, _ in tree.elements}
    assert tags.isdisjoint({"script", "img", "iframe", "link", "object", "embed", "form", "input"})
    assert not [name for _, attributes, _ in tree.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in tree.text["evaluation"] and HOSTILE in tree.text["samples"] and HOSTILE in tree.text["recipe"]
    assert html.count("<script") == 0
    marked = [attributes for tag, attributes, _ in tree.elements if tag == "mark"]
    assert len(marked) == 1


def test_hostile_metrics_are_text(tmp_path: pathlib.Path) -> None:
    record = {
        "stage": HOSTILE,
        "step": 1,
        "time": "never",
        "loss": HOSTILE,
        "layer_loss": [{}, "x"],
    }
    lines = [record, record | {"step": 2, "time": 5}, record | {"step": 2, "time": 9}, {"stage": 3}, {"step": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, tree = page(tmp_path)
    assert {tag for tag, _, _ in tree.elements}.isdisjoint({"script", "img"})
    assert HOSTILE in tree.text["stages"] and HOSTILE in tree.text["loss"]


def test_nothing_is_loaded_from_elsewhere(finished: pathlib.Path) -> None:
    html, tree = page(finished)
    policy = next(a["content"] for t, a, _ in tree.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "script" not in policy
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style
    for tag, attributes, _ in tree.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name) is None or attributes[name].startswith("#"), f"{tag} {name}"


def test_an_unfinished_run(unfinished: pathlib.Path) -> None:
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "st')
    _, tree = page(unfinished)
    assert "unfinished, at step 7 of 9 of stage2" in tree.text["head"]
    assert "when the run has finished" in tree.text["quality"]
    assert "7 / 9" in tree.text["stages"] and "0 / 4" in tree.text["stages"]
    assert tree.count("path", "loss", "line") == 4
    # 0.25 s a step of 128 tokens.
    assert tree.text["stages"].count("512") == 2


def test_before_the_first_step_and_without_a_config(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    _, tree = page(tmp_path)
    assert "no step logged yet" in tree.text["head"] and "0 / 12" in tree.text["stages"]
    (tmp_path / "config.json").unlink()
    log_stage(tmp_path, "stage1", 3)
    _, tree = page(tmp_path)
    assert "by steps" in tree.text["loss"] and "no config.json" in tree.text["recipe"]


def test_a_failed_attempt_leaves_the_page(finished: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    before = page(finished)[0]
    (finished / "summary.json").write_text("{")
    assert command_line("--workdir", str(finished)) == 1
    assert re.search(rf"{re.escape(str(finished / 'summary.json'))} .*\bnot JSON\b", capsys.readouterr().err)
    assert (finished / "report" / "index.html").read_text() == before
    assert [path.name for path in (finished / "report").iterdir()] == ["index.html"]


def test_command_line(unfinished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert command_line(f"--workdir={unfinished}", "--usd_per_hour", "2") == 0
    assert pathlib.Path(capsys.readouterr().out.strip()).samefile(unfinished / "report" / "index.html")
    assert command_line("--workdir", str(tmp_path / "elsewhere")) == 1
    assert re.search(rf"{re.escape(str(tmp_path / 'elsewhere'))} .*metrics\.jsonl", capsys.readouterr().err)
    assert command_line() == 1
    assert "expected --workdir DIR" in capsys.readouterr().err


def place(html: str, kind: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", re.search(kind + r'" d="M([^"]*)"', html)[1])
    ]


@pytest.mark.parametrize("values", [[0.0, 10.0, 5.0], [1e-5, 1e-2, 1e-3]], ids=["linear", "log"])
def test_a_line_goes_through_its_values(values: list[float]) -> None:
    """Every value is a tick of the axis: the line has to be at the height of that tick's label."""
    html = line_chart("t", [Curve("a", [(float(i), y) for i, y in enumerate(values)])], what="w", x_name="x")
    labels = dict(re.findall(r'class="y" x="-8" y="([\d.]+)">([^<]*)<', html))
    heights = {float(label): float(y) - 4 for y, label in labels.items()}
    drawn = place(html, "line c1")
    assert [x for x, _ in drawn] == [0, 500, 1000]
    for (_, y), value in zip(drawn, values, strict=True):
        assert y == pytest.approx(heights[value], abs=0.2)


def test_many_points_become_mean_and_range() -> None:
    points = [(float(i), 1.0 if i % 2 else 3.0) for i in range(4 * chart_module.COLUMNS)]
    points[8:12] = [(8.0 + i, None) for i in range(4)]
    runs = chart_module.columns_of(points)
    assert [len(run) for run in runs] == [2, chart_module.COLUMNS - 3]
    assert {column[1:] for run in runs for column in run} == {(2.0, 1.0, 3.0)}
    assert runs[0][1][0] == 7.0


def test_heat_map_colours() -> None:
    rows = [("0", [(50.0, 1.0), (100.0, 10.0)]), ("1", [(50.0, 100.0), (100.0, math.inf)])]
    html = chart_module.heat_map("t", rows, what="w", x_name="x", x_end=100.0)
    cells = {int(level): d for level, d in re.findall(r'class="h(\d+)" d="([^"]*)"', html)}
    top, half = chart_module.HEAT_LEVELS - 1, chart_module.HEAT_COLUMNS // 2
    assert set(cells) == {0, round(top / 2), top}, "10 is in the middle of 1 and 100"
    assert {level: len(re.findall("M", d)) for level, d in cells.items()} == dict.fromkeys(cells, half)
    assert re.findall(r"M(\d+) (\d+)", cells[top])[-1] in [(str(x), "1") for x in range(half)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.11, 0.29, [0.15, 0.2, 0.25]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_linear_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert chart_module.linear_ticks(low, high, 4) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.2e6, "1.2M"),
        (1e-5, "1e-5"),
        (-2.54e-4, "-2.54e-4"),
        (512, "512"),
        (0.25, "0.25"),
        (3.5e9, "3.5B"),
        (-2000, "-2K"),
        (0, "0"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert chart_module.short(value) == text


def chromium(path: pathlib.Path, profile: pathlib.Path, *options: str) -> tuple[str, str]:
    """(the page's elements after loading, what was logged to its console)."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
    timing = ("--virtual-time-budget=2000", "--enable-logging=stderr", f"--user-data-dir={profile}", "--dump-dom")
    done = subprocess.run(
        [CHROMIUM, *flags, *timing, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Nothing is logged to the console, no script of the run's text runs, and a phone need not scroll sideways."""
    html, _ = page(finished)
    path = finished / "report" / "index.html"
    dom, console = chromium(path, tmp_path / "profile")
    assert console == ""
    assert "<title>broken" not in dom and dom.count("<figure") == html.count("<figure")
    probe = tmp_path / "probe.html"
    measure = (
        "<script>document.title=`wide ${document.documentElement.scrollWidth} of ${innerWidth}`;nowhere()</script>"
    )
    probe.write_text(re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", f"{measure}</body>"))
    dom, console = chromium(probe, tmp_path / "profile", "--window-size=390,800")
    assert "nowhere is not defined" in console, "the console is seen at all"
    wide, of = map(int, re.search(r"<title>wide (\d+) of (\d+)", dom).groups())
    assert wide <= of <= 600
