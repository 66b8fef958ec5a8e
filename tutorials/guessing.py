"""A guessing game in turns: an agent chooses what to ask about a city or an animal, and a language model guesses it.

The conversation is a ``ChatEnv``'s. The agent's turn is one of four questions, the environment answers it truly, and
the language model is read after each answer: what it believes of every candidate, and its hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from torch.utils.data import DataLoader
from torchrl.data import Binary, Unbounded
from torchrl.data.llm import History
from torchrl.envs import StepCounter, Transform, TransformedEnv
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import ChatHistory

COUNTRIES = {
    "Paris": "France",
    "Rome": "Italy",
    "Tokyo": "Japan",
    "Moscow": "Russia",
    "Cairo": "Egypt",
    "Berlin": "Germany",
    "Madrid": "Spain",
    "London": "England",
    "Beijing": "China",
    "Athens": "Greece",
}
SOUNDS = {
    "dog": "barks",
    "cat": "meows",
    "cow": "moos",
    "lion": "roars",
    "duck": "quacks",
    "bee": "buzzes",
    "horse": "neighs",
    "snake": "hisses",
    "wolf": "howls",
    "bird": "sings",
}
THINGS = (*COUNTRIES, *SOUNDS)
QUESTIONS = (
    "Which country is it in?",
    "What sound does it make?",
    "What is its first letter?",
    "Is it well known?",
)
OPENINGS = {"city": "I am thinking of a city.", "animal": "I am thinking of an animal."}
CUES = {"city": "The city is", "animal": "The animal is a"}
# Reads texts; returns logits of THINGS as the next word, [B, 20], and hidden states, [B, D].
Reader = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]


def kind_of(thing: str) -> str:
    """Return "city" or "animal"."""
    return "city" if thing in COUNTRIES else "animal"


def answer(thing: str, question: str) -> str:
    """Answer a question about a thing truly."""
    country, sound = COUNTRIES.get(thing), SOUNDS.get(thing)
    return {
        QUESTIONS[0]: f"It is in {country}." if country else "It lives in many countries.",
        QUESTIONS[1]: f"It {sound}." if sound else "It makes no sound.",
        QUESTIONS[2]: f"Its first letter is {thing[0].upper()}.",
        QUESTIONS[3]: "Yes, it is well known.",
    }[question]


class Ask(TensorDictModuleBase):
    """Says the question that was chosen, as the assistant's turn of the chat."""

    in_keys = ("action", "history")
    out_keys = (("history", "full"),)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        chats = []
        for row in tensordict.unbind(0):
            turn = History(role="assistant", content=QUESTIONS[int(row["action"])], batch_size=())
            prompt = row["history"].prompt
            chats.append(ChatHistory(prompt=prompt, full=prompt.append(turn, inplace=False), batch_size=()))
        return tensordict.set("history", lazy_stack(chats))


class Guesser(Transform):
    """Answers the question, has the language model read the chat, and rewards what it learned of the truth.

    After each turn it writes the log-probabilities of the candidates, those of the same kind as the thing, ``"belief"``
    ``[B, 20]``; the hidden state of the text that was read, ``"hidden_state"`` ``[B, D]``; and the questions that were
    not asked yet, ``"open"``, bool ``[B, 4]``. The reward is by how much the log-probability of the true thing grew in
    this turn: rewards add up to what the whole conversation gave.

    Args:
        read: the language model. What it says of a text is kept, and the text is not read again.
        size: D.
    """

    def __init__(self, read: Reader, size: int) -> None:
        super().__init__()
        self.read, self.size = read, size
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def look_up(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and hidden states of texts; those that are new are read in one request."""
        new = sorted(set(texts) - set(self.known))
        if new:
            self.known.update(zip(new, zip(*self.read(new), strict=True), strict=True))
        logits, states = zip(*(self.known[text] for text in texts), strict=True)
        return torch.stack(logits), torch.stack(states)

    def _observe(self, tensordict: TensorDictBase, things: list[str]) -> TensorDictBase:
        chats = [list(chat.content) for chat in (row.prompt for row in tensordict["history"].unbind(0))]
        texts = [" ".join([*chat, CUES[kind_of(thing)]]) for chat, thing in zip(chats, things, strict=True)]
        logits, states = self.look_up(texts)
        possible = torch.tensor([[kind_of(other) == kind_of(thing) for other in THINGS] for thing in things])
        still = torch.tensor([[question not in chat for question in QUESTIONS] for chat in chats])
        belief = logits.masked_fill(~possible, -torch.inf).log_softmax(-1)
        return tensordict.update({"belief": belief, "hidden_state": states, "open": still})

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._observe(tensordict_reset, list(tensordict_reset["thing"]))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        things = list(tensordict["thing"])
        chats = []
        for chat, thing in zip(next_tensordict["history"].unbind(0), things, strict=True):
            turn = History(role="user", content=answer(thing, chat.prompt.content[-1]), batch_size=())
            chats.append(ChatHistory(prompt=chat.prompt.append(turn, inplace=False), batch_size=()))
        after = self._observe(next_tensordict.set("history", lazy_stack(chats)), things)
        truth = torch.tensor([THINGS.index(thing) for thing in things])[:, None]
        gained = after["belief"].gather(-1, truth) - tensordict["belief"].gather(-1, truth)
        # The last question ends the game: nothing comes after it that a critic could value.
        return after.update({"reward": gained, "terminated": after["done"].clone()})

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        batch = observation_spec.shape
        observation_spec["belief"] = Unbounded((*batch, len(THINGS)))
        observation_spec["hidden_state"] = Unbounded((*batch, self.size))
        observation_spec["open"] = Binary(len(QUESTIONS), shape=(*batch, len(QUESTIONS)), dtype=torch.bool)
        return observation_spec

    def transform_reward_spec(self, reward_spec: Any) -> Any:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1))
        return reward_spec


def make_game(guesser: Guesser, rows: int, things: tuple[str, ...], *, turns: int, seed: int) -> TransformedEnv:
    """Return games side by side, about things that are drawn again at each reset.

    The games have a copy of the guesser, which keeps what it reads where the guesser keeps it.
    """
    data = [{"query": OPENINGS[kind_of(thing)], "thing": thing} for thing in things]
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=1, shuffle=True, generator=order)
    env = ChatEnv.from_dataloader(loader, batch_size=(rows,))
    return env.append_transform(StepCounter(max_steps=turns)).append_transform(guesser.clone())
