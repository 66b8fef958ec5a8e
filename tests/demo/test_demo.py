"""The demo without a server: prompts, projection, picture, table and files, and the whole of it on the fake engine."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from helpers.fake_engine import EOS_ID, RecordingEngine, response_of, tiny_tokenizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from rich.console import Console
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import LogProbs, Text, Tokens

from torchrl_sglang_hidden import CapabilityError, HiddenStates, InputError
from torchrl_sglang_hidden.demo import run
from torchrl_sglang_hidden.demo.prompts import MAX_NEW_TOKENS, PROMPTS, SYSTEM_PROMPT
from torchrl_sglang_hidden.demo.run import DemoResult, plot_pooled, project, rollout_table, run_demo, save_rollout

NO_SERVER = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Demo:
    """One run of the demo on the fake engine."""

    result: DemoResult
    engine: RecordingEngine
    printed: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = tmp_path_factory.mktemp("demo")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory / "tokenizer")
    engine = RecordingEngine(tokenizer=tokenizer, tokenizer_path=str(directory / "tokenizer"))
    out = io.StringIO()
    result = run_demo(output_dir=directory / "new" / "out", model=engine, console=Console(file=out, width=200))
    return Demo(result, engine, out.getvalue())


def row(query: str, kind: str, response: str, log_probs: list[float], state_D: list[float]) -> TensorDict:
    return TensorDict(
        query=query,
        kind=kind,
        text=Text(prompt="p", response=response, full="p" + response),
        tokens=Tokens(response=torch.arange(len(log_probs))),
        log_probs=LogProbs(response=torch.tensor(log_probs)),
        hidden_states=HiddenStates(
            response=torch.tensor(state_D), response_count=torch.tensor(len(log_probs)), batch_size=()
        ),
    )


def printed_lines(rollout: TensorDictBase, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(rollout_table(rollout))
    return [line.rstrip() for line in out.getvalue().splitlines()]


class TestPrompts:
    def test_two_dozen_distinct_ones_of_six_kinds_with_equal_shares(self) -> None:
        kinds = [prompt.kind for prompt in PROMPTS]
        assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS) == 24
        assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(kinds, 4)
        assert {"arithmetic", "capitals", "rhymes"} < set(kinds)

    def test_the_table_shows_every_prompt_whole_at_100_columns(self) -> None:
        rollout = lazy_stack([row(prompt.text, prompt.kind, "x" * 200, [-1.0], [1.0]) for prompt in PROMPTS])
        lines = printed_lines(rollout)
        assert all(any(line.startswith(f" {prompt.text}  ") for line in lines) for prompt in PROMPTS)


class TestProject:
    def test_finds_the_plane_that_the_points_lie_in(self) -> None:
        generator = torch.Generator().manual_seed(0)
        flat_B2 = torch.randn(20, 2, generator=generator) * torch.tensor([5.0, 2.0])
        basis_D2 = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q
        points_B2, explained_2 = project(flat_B2 @ basis_D2.T + 100)
        torch.testing.assert_close(
            torch.cdist(points_B2, points_B2), torch.cdist(flat_B2, flat_B2), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(points_B2.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
        torch.testing.assert_close(explained_2.sum(), torch.tensor(1.0))
        variances = points_B2.var(0)
        assert variances[0] > variances[1]
        torch.testing.assert_close(explained_2, variances / variances.sum())

    def test_is_the_same_for_the_same_vectors_in_another_dtype(self) -> None:
        vectors_BD = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
        points_B2, _ = project(vectors_BD)
        torch.testing.assert_close(project(vectors_BD.double())[0], points_B2, rtol=1e-4, atol=1e-5)

    def test_orients_the_axes_whatever_sign_the_decomposition_gave(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors_BD = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
        points_B2, _ = project(vectors_BD)
        svd = torch.linalg.svd
        monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: [-part for part in svd(*args, **kwargs)])
        torch.testing.assert_close(project(vectors_BD)[0], points_B2)

    def test_equal_vectors_are_one_point_without_variance(self) -> None:
        points_B2, explained_2 = project(torch.ones(3, 4))
        assert points_B2.tolist() == [[0, 0]] * 3
        assert explained_2.tolist() == [0, 0]

    @pytest.mark.parametrize("shape", [(1, 4), (4, 1), (4,), (2, 3, 4)])
    def test_refuses_what_has_no_plane(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")):
            project(torch.ones(shape))


class TestPlotPooled:
    KINDS = ("a", "b", "a", "c", "b")
    VECTORS_BD = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))

    def test_each_kind_has_its_points_colour_marker_and_legend_entry(self) -> None:
        axes = plot_pooled(self.VECTORS_BD, self.KINDS, title="t").axes[0]
        points_B2, _ = project(self.VECTORS_BD)
        for kind, drawn in zip("abc", axes.collections, strict=True):
            rows = [index for index, other in enumerate(self.KINDS) if other == kind]
            torch.testing.assert_close(torch.tensor(drawn.get_offsets().data).float(), points_B2[rows])
        assert len({to_hex(drawn.get_facecolor()[0]) for drawn in axes.collections}) == 3
        assert len({drawn.get_paths()[0].vertices.tobytes() for drawn in axes.collections}) == 3
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "c"]

    def test_the_six_kinds_of_the_demo_differ_in_colour_and_in_marker(self) -> None:
        kinds = list(dict.fromkeys(prompt.kind for prompt in PROMPTS))
        collections = plot_pooled(torch.randn(6, 8), kinds, title="t").axes[0].collections
        assert len({to_hex(drawn.get_facecolor()[0]) for drawn in collections}) == 6
        assert len({drawn.get_paths()[0].vertices.tobytes() for drawn in collections}) == 6

    def test_says_what_the_axes_are(self) -> None:
        axes = plot_pooled(self.VECTORS_BD, self.KINDS, title="Some states").axes[0]
        _, explained_2 = project(self.VECTORS_BD)
        assert axes.get_title() == "Some states"
        assert axes.get_xlabel() == f"principal component 1 ({explained_2[0]:.0%} of the variance)"
        assert axes.get_ylabel() == f"principal component 2 ({explained_2[1]:.0%} of the variance)"

    def test_text_is_large_enough_to_read(self) -> None:
        figure = plot_pooled(self.VECTORS_BD, self.KINDS, title="t")
        axes = figure.axes[0]
        legend = axes.get_legend().get_texts()
        sizes = [text.get_fontsize() for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *legend)]
        assert min(sizes) >= 11
        assert figure.dpi >= 150

    def test_needs_no_display(self) -> None:
        assert type(plot_pooled(self.VECTORS_BD, self.KINDS, title="t").canvas) is FigureCanvasAgg

    def test_refuses_another_number_of_kinds(self) -> None:
        with pytest.raises(InputError, match="4 kinds for 5 vectors"):
            plot_pooled(self.VECTORS_BD, self.KINDS[:4], title="t")

    def test_without_matplotlib_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(CapabilityError, match=r"pip install 'torchrl-sglang-hidden\[demo\]'"):
            plot_pooled(self.VECTORS_BD, self.KINDS, title="t")


class TestTable:
    ROLLOUT = lazy_stack(
        [
            row("One?", "odd", "first\n\n  line", [-0.5, -1.0, -1.5], [3.0, 4.0]),
            row("Three?", "odd", "a [red]long[/red] answer " * 9, [-2.0], [6.0, 8.0]),
            row("Two?", "even", "second", [-0.25, -0.25], [0.0, 1.0]),
        ]
    )

    def test_one_line_per_prompt_under_its_kind(self) -> None:
        lines = printed_lines(self.ROLLOUT)
        first = next(index for index, line in enumerate(lines) if line.strip() == "odd")
        assert lines[first + 3].strip() == "even"
        one, three, two = lines[first + 1], lines[first + 2], lines[first + 4]
        assert one.split() == ["One?", "first", "line", "3", "-1.00", "3", "5.0"]
        assert two.split() == ["Two?", "second", "2", "-0.25", "2", "1.0"]
        assert three.split()[-4:] == ["1", "-2.00", "1", "10.0"]

    def test_long_texts_end_in_an_ellipsis_and_markup_is_text(self) -> None:
        lines = printed_lines(self.ROLLOUT)
        assert max(map(len, lines)) <= 100
        (long,) = [line for line in lines if "Three?" in line]
        assert "a [red]long[/red] answer" in long
        assert "…" in long

    def test_the_rows_pooled_are_those_measured_not_the_tokens(self) -> None:
        rollout = self.ROLLOUT.clone()
        rollout[0]["hidden_states"].response_count.fill_(7)
        (one,) = [line for line in printed_lines(rollout) if "One?" in line]
        assert one.split()[-4:] == ["3", "-1.00", "7", "5.0"]

    def test_headings(self) -> None:
        text = " ".join(printed_lines(self.ROLLOUT))
        for heading in ("prompt", "response", "tokens", "log-prob", "rows", "pooled", "norm"):
            assert heading in text


class TestSaveRollout:
    def test_ragged_rows_come_back(self, tmp_path: Path) -> None:
        # More than ten: the rows are directories, and must come back in the order of their numbers.
        rows = [row(f"q{i}", "k", f"r{i}", [-float(i)] * (i + 1), [float(i), 1.0]) for i in range(12)]
        save_rollout(lazy_stack(rows), tmp_path / "new" / "rollouts")
        loaded = TensorDict.load_memmap(tmp_path / "new" / "rollouts")
        assert loaded.batch_size == (12,)
        assert list(loaded["query"]) == [f"q{i}" for i in range(12)]
        assert loaded["text"].response == [f"r{i}" for i in range(12)]
        assert isinstance(loaded["hidden_states"], HiddenStates)
        assert loaded["hidden_states"].response.tolist() == [[float(i), 1.0] for i in range(12)]
        found = loaded.get(("log_probs", "response"), as_list=True)
        assert [log_probs.tolist() for log_probs in found] == [[-float(i)] * (i + 1) for i in range(12)]

    def test_replaces_an_earlier_and_longer_one(self, tmp_path: Path) -> None:
        for size in (3, 2):
            save_rollout(lazy_stack([row("q", "k", "r", [-1.0], [1.0])] * size), tmp_path / "rollouts")
        assert TensorDict.load_memmap(tmp_path / "rollouts").batch_size == (2,)
        assert not (tmp_path / "rollouts" / "2").exists()

    def test_keeps_what_is_none_of_its_own(self, tmp_path: Path) -> None:
        keep = tmp_path / "rollouts" / "thesis.txt"
        keep.parent.mkdir()
        keep.write_text("years of work")
        with pytest.raises(InputError, match="no saved TensorDict"):
            save_rollout(lazy_stack([row("q", "k", "r", [-1.0], [1.0])]), keep.parent)
        assert keep.read_text() == "years of work"


class TestRunDemo:
    def test_asks_every_prompt_once_in_batches(self, demo: Demo) -> None:
        rollout = demo.result.rollout
        assert [(query, kind) for query, kind in zip(rollout["query"], rollout["kind"], strict=True)] == [
            (prompt.text, prompt.kind) for prompt in PROMPTS
        ]
        assert [len(payload["input_ids"]) for payload in demo.engine.payloads] == [8, 8, 8]

    def test_each_row_is_one_turn_that_answers_its_own_prompt(self, demo: Demo) -> None:
        rollout = demo.result.rollout
        prompts = rollout.get(("tokens", "prompt"), as_list=True)
        responses = rollout.get(("tokens", "response"), as_list=True)
        for index, prompt in enumerate(PROMPTS):
            chat = rollout[index]["history"].prompt
            assert list(chat.role) == ["system", "user"]
            assert list(chat.content) == [SYSTEM_PROMPT, prompt.text]
            assert responses[index].tolist() == response_of(prompts[index].tolist())

    def test_generates_as_told(self, demo: Demo) -> None:
        sampling = demo.engine.requests[0].sampling
        assert (sampling["max_new_tokens"], sampling["temperature"]) == (MAX_NEW_TOKENS, 0)

    def test_pools_prompt_and_response(self, demo: Demo) -> None:
        rollout = demo.result.rollout
        for segment in ("prompt", "response"):
            counts = [len(ids) for ids in rollout.get(("tokens", segment), as_list=True)]
            assert rollout["hidden_states", f"{segment}_count"].tolist() == counts

    def test_saves_what_it_returns(self, demo: Demo) -> None:
        loaded = TensorDict.load_memmap(demo.result.rollout_path)
        rollout = demo.result.rollout
        assert set(loaded.keys(True, True)) == set(rollout.keys(True, True))
        torch.testing.assert_close(loaded["hidden_states"].response, rollout["hidden_states"].response)
        assert list(loaded["query"]) == list(rollout["query"])

    def test_draws_the_prompts(self, demo: Demo) -> None:
        image = torch.tensor(matplotlib.image.imread(demo.result.picture_path))[..., :3]
        assert image.shape == (900, 1350, 3)
        for colour in run._COLOURS[:6]:
            rgb = torch.tensor([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
            # Points are drawn at 90 % over white.
            assert ((image - (0.9 * rgb + 0.1)).abs().amax(-1) < 0.02).any(), colour

    def test_prints_bar_table_and_places(self, demo: Demo) -> None:
        assert "24/24 prompts" in demo.printed
        assert all(prompt.text in demo.printed for prompt in PROMPTS)
        assert str(demo.result.picture_path) in demo.printed
        assert str(demo.result.rollout_path) in demo.printed

    def test_the_printed_lines_read_it_in_a_fresh_interpreter(self, demo: Demo) -> None:
        lines = [line[4:] for line in demo.printed.splitlines() if line.startswith("    ")]
        code = "\n".join(lines[-3:]) + "\nprint(rollout.batch_size[0], rollout['text'].response[0])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["24", *demo.result.rollout["text"].response[0].split()], done.stderr

    @pytest.mark.parametrize("missing", ["matplotlib", "place"])
    def test_what_it_needs_is_looked_for_first(
        self, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_launch(*args: Any, **kwargs: Any) -> None:
            pytest.fail("a server was launched first")

        monkeypatch.setattr(run, "launch", no_launch)
        monkeypatch.setattr(run, "demo_model", no_launch)
        if missing == "matplotlib":
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        else:
            (tmp_path / "rollouts").write_text("a file")
        with pytest.raises(CapabilityError if missing == "matplotlib" else InputError):
            run_demo(output_dir=tmp_path)

    def test_launches_the_demo_model_and_closes_the_server(
        self, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launched: list[Any] = []

        class Launched(RecordingEngine):
            url = NO_SERVER

        def launch(model: Path, **server_args: Any) -> Launched:
            launched.append(model)
            tokenizer_path = demo.engine.info.tokenizer_path
            launched.append(Launched(tokenizer_path=tokenizer_path, respond=lambda ids: [7, EOS_ID]))
            return launched[-1]

        monkeypatch.setattr(run, "launch", launch)
        monkeypatch.setattr(run, "demo_model", lambda: tmp_path / "model")
        out = io.StringIO()
        run_demo(output_dir=tmp_path / "out", console=Console(file=out, width=100))
        assert launched[0] == tmp_path / "model"
        assert launched[1].closed == 1
        assert NO_SERVER in out.getvalue()
