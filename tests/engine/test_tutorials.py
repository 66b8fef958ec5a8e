"""The tutorials run, and carry the outputs of such a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from torchrl_sglang_hidden import SGLangServer

TUTORIALS = Path(__file__).parents[2] / "tutorials"

# What a reader of each lesson must see.
LESSONS: dict[str, tuple[str, ...]] = {
    "101_first_rollout": (
        r"pools inside the server: True",
        r"'The capital of France is' -> ' Paris",
        r"hidden_states\.response +torch\.float32 +\(576,\)",
        r"pooled responses: +torch\.Size\(\[2, 576\]\)",
        r"tensor\(\[\[ 5, 12, 16\],",
        r"the head says ' Paris' at (-0\.\d{3})\d; the engine sampled it at \1",
        r"collected \(8, 1\) of kinds \['arithmetic', 'capitals'\]",
        r"The capital of Kenya is Nairobi\.",
        r"torch\.Size\(\[24, 1\]\)",
    ),
    "102_choosing_actions": (
        r"' left': 2049",
        r"The stairs lead to the roof\. You walk \.\.\. (up|down)\n",
        r"The lift is full\. You look \.\.\. (left|up)\n",
        r"logits \[B, A\]: \(3, 4\)  log-probs agree",
        r"' Paris' +1 tokens  log-prob +-0\.26",
        r"' a town called Nice' +4 tokens",
        r"tensor\(\[\[9\.9900e-01,",
        r'temperature_scale:\{"schedule":\{"linear":\[1\.5,0\.1,null\]\}\}',
        r"3\.2\d  'The capital of France is Paris\.'",
    ),
    "103_what_a_pooled_state_is": (
        r"torch\.Size\(\[32, 11, 576\]\)",
        r"as they are +mean cosine \+1\.000, effective rank +2\.\d of 31",
        r"standardised +mean cosine -0\.0\d\d, effective rank 1\d\.\d of 31",
        r"layer +-1: thing 100% of 8 \(shuffled +\d+%, zeros +25%, p = 0\.05\)",
        r"which thing +100%, zeros +25%, p = 0\.05, beats its controls: True",
        r"a coin, thrown per sentence +\d+%, .* beats its controls: False",
    ),
    "104_language_model_as_state_encoder": (
        r"8 wordings to train on",
        r"torch\.Size\(\[128, 5, 576\]\) CacheInfo\(hits=\d+, misses=\d\d, ",
        r"hidden states +trained: \+0\.\d\d +held-out wordings: \+0\.\d\d",
        r"zeros +trained: [+-]0\.[01]\d",
        r"hidden states against shuffled: t = \d+\.\d, p = ",
    ),
    "105_from_a_data_set_to_an_agent": (
        r"(4096|2048) steps, \d+ episodes of \+0\.4\d on average",
        r"(4096|2048) rows, 0 failures, states \(\1, 576\)",
        r"AWR +wordings of the data: \+0\.[89]\d +wordings that are not in it: \+0\.",
        r"wordings of the data +means 0\.[01]\d standard deviations apart, .*, p = (0\.[1-9]|1\.0)",
        r"other wordings +means [01]\.\d\d standard deviations apart, .*, p = 0\.005",
    ),
    "106_a_mission_in_a_room": (
        r"64 rooms: image \(5, 5, 3\), 20 different missions",
        r"hidden_state \(64, 40, 64\), CacheInfo\(hits=\d+, misses=20, ",
        r"thing +read from a wording that was held out: (100|9\d)%",
        r"colour +read from a wording that was held out: (100|9\d)%",
        r"hidden states +at the end of training: 0\.[2-9]\d +new rooms: 0\.",
        r"zeros +at the end of training: 0\.[2-5]\d",
        r"hidden states against shuffled: t = ",
    ),
    "107_a_picture_as_a_state": (
        r"640 frames of \(168, 168, 3\), torch\.uint8",
        r"a prompt of 43 rows, of which the image is 36",
        r"vectors \(640, 64\); the same frames again: (\de-0[6-9]|0e\+00) apart",
        r"layer  0: the agent's row moved by 0\.[34]\d\d, the median of the others by 0\.0",
        r"heading of the agent +frames held out 100%; rooms held out: vector (100|9\d)% .* beats its controls: True",
        r"cell of the ball +frames held out +[67]\d%; rooms held out: vector +\d% .* beats its controls: False",
        r"a coin, thrown per frame .* beats its controls: False",
        r"vector +by steps apart: \+0\.9\d \+0\.9\d \+0\.8\d",
        r"one by one \d+ ms a frame, again \d+ ms",
    ),
    "108_pixels_beside_text": (
        r"30 missions in the data, 10 for the test; \d+ episodes, 2\d% of them paid",
        r"hidden states \(\d+, 576\), tiles \(\d+, 243\); 30 prompts were sent",
        r"the goal +hidden state +(100|[89]\d)%, pixels +[2-7]\d%",
        r"the side of the water +hidden state +[1-3]\d%, pixels +(100|[89]\d)%",
        r"pixels \+ hidden +right in new worlds, new words: mean ",
        r"pixels \+ zeros +right in new worlds, new words: mean ",
        r"pixels \+ hidden less pixels \+ shuffled: [+-]\d\.\d\d, 95 % from ",
    ),
    "109_a_teacher_on_a_server": (
        r"the teacher's states \(11, 576\), torch\.bfloat16",
        r"KL\(student ‖ teacher\) \d\.\d\d nats a token; by hand from all logits: 0\.00\d\d from that",
        r"the state, bfloat16 +1,152 bytes a token\n",
        r"all logits, float32 +196,608 bytes a token",
        r"sampled token +noise +\d+\.\d\d, direction [+-]\d\.",
        r"forward +noise +-?0\.[01]\d, direction \+(0\.9\d|1\.00)",
        r"reverse +noise +-?0\.[01]\d, direction \+0\.[89]\d",
        r"forward +KL [01]\.\d\d, seeds .*; [2-9]\d% of the untrained student's",
        r"reverse +KL [01]\.\d\d, seeds .*; [2-7]\d% of the untrained student's",
        r"forward less sampled token: [+-]\d\.\d\d, 95 % from ",
    ),
    "110_only_what_is_possible": (
        r"possible: \['north', 'south', 'east', 'west'\]",
        r"turn 3: \w+ +of \[.+\]; without the mask \d\d% for what is impossible",
        r"logits \[B, A\] \(2, 6\)  hidden states \(2, 576\)",
        r"160 prompts; logits \(240, 6\), hidden states \(240, 576\)",
        r"hidden states +chest opened: at first +[1-4]\d%, .* (100|[3-9]\d)%",
        r"no mask +chest opened: at first +\d%, in the last four batches +\d%",
        r"hidden states less no mask: \+0\.\d\d, 95 % from ",
    ),
    "111_grpo_with_a_baseline": (
        r"even 0 +'( \w+)*' +reward [01]\.\d\d",
        r"states of prompts and answers: \(8, 1, 64\) \(8, 1, 64\)",
        r"the other answer +mean squared advantage 0\.\d+, variance of the gradient 100%",
        r"hidden states +mean squared advantage 0\.\d+, variance of the gradient +\d+%",
        r"reward 0\.\d\d on average; its variance 0\.\d+, of which 0\.\d+ is chance",
        r"hidden states less shuffled: [+-]0\.\d+ of reward, 95 % from ",
    ),
    "112_a_reward_in_every_turn": (
        r"\w+: I am thinking of an? (city|animal)\. \w+.*\?.*\.\n",
        r"  (Which|What|Is) .*\? +reward [+-]\d\.\d\d, the guess is now \w+",
        r"\d\d+ conversations were read; right guesses [345]\d%",
        r"sum of rewards and right guess: correlation \+0\.\d\d; shuffled, 200 times: between -0\.\d\d and \+0\.\d\d",
        r"each turn +guessed right: at first +[345]\d%, in the last three batches +[5-9]\d%",
        r"shuffled +guessed right: at first +[345]\d%, in the last three batches +[2-6]\d%",
        r"training, each turn less shuffled: [+-]0\.\d\d, 95 % from ",
    ),
    "113_stopping_an_answer": (
        r"Afghanistan +right +' Kabul\.",
        r"4\d of 114 answers are right; 23\.\d tokens each",
        r"state +0\.[78]\d +0\.[89]\d +0\.[89]\d",
        r"head +0\.[12]\d +' ",
        r"head +[3-6]\d% +[5-8]\d% +[789]\d% +1\d\.\d\n",
        r"shuffled labels +(100|[89]\d)% +[34]\d% +(100|[89]\d)% +2\d\.\d\n",
        r"every answer +100% +[34]\d% +100% +23\.\d\n",
        r"head against shuffled labels: t = [3-9]\.\d|head against shuffled labels: t = \d\d\.",
    ),
}
# Fewer seeds and steps where a lesson trains for minutes; what is committed has all of them.
SHORTER = {
    "104_language_model_as_state_encoder": ("range(5), 32_768", "range(2), 8_192"),
    "105_from_a_data_set_to_an_agent": ("rollout(64, act_mediocre", "rollout(32, act_mediocre"),
    "106_a_mission_in_a_room": ("range(5, 10), 65_536", "range(2), 4_096"),
    "108_pixels_beside_text": ("4000, range(5, 10), 350, 100", "800, range(2), 60, 16"),
    "109_a_teacher_on_a_server": ("range(5, 10), 6, 6, 8, 8", "range(5, 7), 1, 4, 2, 2"),
    "110_only_what_is_possible": ("range(5), 24", "range(2), 5"),
    "111_grpo_with_a_baseline": ("range(5), 20, 10", "range(2), 3, 4"),
    "112_a_reward_in_every_turn": ("400, range(5), 12", "60, range(2), 3"),
    "113_stopping_an_answer": ("range(10, 15)", "range(10, 12)"),
}
# The session's server takes the place of these, in float32 where a lesson leaves the dtype to SGLang. Others start
# theirs in their notebook: some of another model, and one of this model as it is printed.
SHARED_LAUNCH = r'launch\(demo_model\(\)(, dtype="float32")?(, sleep_on_idle=True)?\)'
OWN_SERVER = {"106_a_mission_in_a_room"}
# Ray, where it is installed, misses ipywidgets in every notebook; TorchRL's own files read what TensorDict will drop;
# SciPy warns where the two seeds of a short form came out equal.
NOT_OURS = (
    r"Missing packages: \['ipywidgets'\]|/torchrl/envs/llm/\S+ DeprecationWarning: tensordict\.|"
    r"RuntimeWarning: Precision loss occurred in moment calculation"
)
every_lesson = pytest.mark.parametrize("name", LESSONS)


def read(name: str) -> NotebookNode:
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook: NotebookNode) -> str:
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook))


def pictures_of(notebook: NotebookNode) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def assert_shows_the_lesson(notebook: NotebookNode, name: str) -> None:
    text = text_of(notebook)
    assert [pattern for pattern in LESSONS[name] if not re.search(pattern, text)] == []
    pictures = pictures_of(notebook)
    assert pictures
    assert all(len(picture) > 12_000 for picture in pictures)
    notices = [output for output in outputs(notebook) if not re.search(NOT_OURS, output.get("text", ""))]
    assert [output for output in notices if output.output_type == "error" or output.get("name") == "stderr"] == []


def test_there_is_no_lesson_that_no_test_runs() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == set(LESSONS)


def test_some_lessons_share_a_server_and_some_launch_their_own() -> None:
    could = [bool(re.search(SHARED_LAUNCH, "".join(cell.source for cell in read(name).cells))) for name in LESSONS]
    assert could == [True, True, True, True, True, True, False, True, True, True, False, True, True]
    assert set(LESSONS) > OWN_SERVER


@every_lesson
def test_it_runs(name: str, smol: SGLangServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(name)
    long, short = SHORTER.get(name, ("", ""))
    assert any(long in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.source = cell.source.replace(long, short) if long else cell.source
            running = f"__import__('torchrl_sglang_hidden').connect({smol.url!r})"
            cell.source = cell.source if name in OWN_SERVER else re.sub(SHARED_LAUNCH, running, cell.source)
    # Lessons import what stands beside them.
    monkeypatch.setenv("PYTHONPATH", str(TUTORIALS), prepend=os.pathsep)
    # Raises with the cell and its traceback where one fails.
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert_shows_the_lesson(notebook, name)
    assert list(tmp_path.iterdir()) == []


@every_lesson
def test_it_is_committed_with_its_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert_shows_the_lesson(notebook, name)
    assert notebook.cells[0].source.startswith(f"# {name[:3]}")
    assert "What you'll learn" in notebook.cells[0].source
    assert (TUTORIALS / f"{name}.ipynb").stat().st_size < 500_000


@every_lesson
def test_it_names_no_directory_of_the_machine_it_ran_on(name: str) -> None:
    found = re.findall(r"(?<![\w.<])/(?:[\w.-]+/)+[\w.-]*", text_of(read(name)))
    assert found == []
