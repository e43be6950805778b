"""Numbers that other papers print for the models of our experiments stand beside ours."""

import logging
from importlib.resources import files
from io import StringIO

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from proxytune.config.schema import register as register_schema
from proxytune.errors import UserError
from proxytune.experiment import runner
from proxytune.experiment.checks import check_config
from proxytune.files import ROOT
from proxytune.records import MetricInfo, Score
from proxytune.results import paper, paper_tables, stats, tables
from proxytune.results.comparison import comparison
from proxytune.results.folder import to_csv

EXPERIMENTS = sorted(set(paper.elsewhere()["table"]))


def config(*given):
    GlobalHydra.instance().clear()
    register_schema()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", list(given))


@pytest.fixture(scope="module")
def table():
    return made("lm_eval_aime24", base=3, expert=9, proxy=15, tuned=21)


def made(task, metric="exact_match", **right):
    scores = {
        (task, system): [Score(str(i), {metric: float(i < count)}) for i in range(30)]
        for system, count in right.items()
    }
    found = [m for (_, s), each in scores.items() for m in stats.metrics(task, s, each)]
    infos = {task: {metric: MetricInfo(metric)}}
    return comparison(found, infos, scores, ("thinklogit_32b", "-"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_the_models_and_benchmarks_of_its_printed_numbers(name):
    cfg = config(f"experiment={name}")
    assert runner.paper_place(cfg) == (name, "-")
    printed = paper.elsewhere()
    printed = printed[printed["table"] == name]
    models = {system: cfg.triple[system].id for system in printed["system"]}
    assert dict(zip(printed["system"], printed["model"], strict=True)) == models
    measured = {key for (task, _), key in paper.KEYS.items() if task in cfg.task}
    assert set(printed["metric"]) <= measured
    assert set(printed["system"]) <= set(cfg.systems)
    assert set(printed["value"].between(0, 100)) == {True}


def test_the_keys_are_the_names_that_lm_eval_gives_its_metrics():
    """A metric's name ends in the filter of the answers, where the task names one."""
    shipped = files("lm_eval") / "tasks"
    aime = (shipped / "aime" / "aime24.yaml").read_text()
    assert "metric: exact_match" in aime and "filter_list" not in aime
    gpqa = (shipped / "gpqa" / "cot_zeroshot" / "_gpqa_cot_zeroshot_yaml").read_text()
    assert "metric: exact_match" in gpqa and 'name: "flexible-extract"' in gpqa
    ours = (files("proxytune.harness") / "tasks" / "math500_verify.yaml").read_text()
    assert "metric: math_verify" in ours and "filter_list" not in ours


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("triple.expert.id=Qwen/Qwen2.5-1.5B-Instruct", "the expert Qwen/Qwen2.5-1.5B-Instruct"),
        ("triple.base.id=/models/Qwen2.5-14B", "the base /models/Qwen2.5-14B"),
        ("triple.tuned.adapter=/mine/lora", "the tuned /mine/lora"),
        ("alpha=0.5", "alpha=0.5"),
    ],
)
def test_another_models_numbers_are_left_out(given, why, caplog):
    with caplog.at_level(logging.INFO):
        assert runner.paper_place(config("experiment=thinklogit_32b", given)) is None
    assert why in caplog.text


def test_a_folder_that_is_named_like_the_model_is_the_model():
    given = "triple.base.id=/models/qwen2.5-32b"
    assert runner.paper_place(config("experiment=thinklogit_32b", given)) is not None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("paper.table=thinklogit_32", r"did you mean thinklogit_32b\?.*known: 2, 3, 4, 5"),
        ("paper.size=13B", "paper.table=thinklogit_32b has no paper.size=13B; known: -;"),
        ("paper={table: '7', size: 70B}", "known: -, pocket;"),
    ],
)
def test_a_place_that_nobody_printed_numbers_for_is_refused(given, why):
    with pytest.raises(UserError, match=why):
        check_config(config("experiment=thinklogit_32b", given))


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
)
def test_the_places_of_the_experiments_are_known(name):
    cfg = config(f"experiment={name}")
    if cfg.paper:
        paper.check_place(cfg.paper.table, cfg.paper.size)


def test_a_system_that_does_not_run_may_be_another_model():
    given = ["systems=[base,expert,proxy]", "triple.tuned.id=mine"]
    assert runner.paper_place(config("experiment=thinklogit_32b", *given)) is not None


def test_every_form_of_the_table_says_who_printed_what(table):
    markdown = tables.to_markdown(table)
    line = next(each for each in markdown.splitlines() if "*printed*" in each)
    assert [cell.strip() for cell in line.split("|")[4:8]] == ["10.0", "28.9", "–", "72.6"]
    assert "expert (deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B), aime24" in markdown
    assert "64 answers a question, temperature 0.6" in markdown and "the paper" not in markdown
    html = tables.to_html(table)
    assert '<span class="paper">printed 28.9</span>' in html and "paper 28.9" not in html
    console = Console(file=StringIO(), width=88)
    console.print(tables.to_rich(table))
    assert "printed elsewhere" in console.file.getvalue()
    assert "the paper" not in console.file.getvalue()


def test_only_what_a_table_shows_has_a_source_there():
    found = tables.printed_sources(made("lm_eval_aime24", base=3, proxy=15))
    assert found == ["base (Qwen/Qwen2.5-32B), aime24: SimpleRL-Zoo's README; one greedy answer"]
    for nothing in (made("gsm8k", "acc", base=3), made("lm_eval_aime24", proxy=3)):
        assert tables.printed_sources(nothing) == []
        assert "rinted" not in tables.to_markdown(nothing)


def test_they_fill_no_table_of_the_paper(table, tmp_path):
    to_csv(table, tmp_path / "thinklogit_32b.csv")
    assert paper_tables.read_ours(tmp_path) == {}
