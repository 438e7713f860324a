"""Rewards behind reward servers: each protocol against a small server that speaks it, batches, retries, faults."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from PIL import Image
from scorer_servers import ScorerServer, deqa, geneval, openrlhf, serving, unirl, verl_omni
from test_adapters import rollout

from syncr1.engine.errors import ChatError, RewardSpecError
from syncr1.engine.methods.reward_names import reward_problems
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rewards.trial import try_rewards
from syncr1.engine.rewards.yours.custom import load_reward
from syncr1.engine.rewards.yours.pickled import dumps, loads
from syncr1.engine.rewards.yours.remote import RemoteReward
from syncr1.engine.settings.reward_specs import reward_name


def coloured(share: float) -> torch.Tensor:
    """A picture whose red is `share`, without other colours."""
    image = torch.zeros(3, 16, 24)
    image[0] = share
    return image


ROLLOUTS = [
    rollout(0, None, coloured(1.0), text="a red square", extra={"metadata": {"tag": "colors"}}),
    rollout(1, "only a text"),
    rollout(2, None, coloured(0.2), text="a square", target="a red square", extra={"tag": "colors", "include": []}),
]


def scored(server: ScorerServer, spec: str, rollouts: Any = ROLLOUTS, **options: Any) -> list[float | None]:
    reward = RemoteReward(spec.replace("URL", server.url), **{"backoff": 0.01, "timeout": 5.0, **options})
    column = score(rollouts, {"remote": reward}).values[:, 0]
    return [None if value.isnan() else round(float(value), 2) for value in column]


@pytest.fixture
def unirl_server() -> Iterator[ScorerServer]:
    with serving(unirl) as server:
        yield server


def test_unirl_s_protocol(unirl_server: ScorerServer) -> None:
    assert scored(unirl_server, "unirl@URL#red") == [1.0, None, 0.2]
    (path, body) = unirl_server.requests[0]
    first, second = json.loads(body)["requests"]
    assert path == "/score" and unirl_server.headers[0]["Content-Type"] == "application/json"
    assert first["metadata"] == {"tag": "colors"} and second["metadata"] is None
    assert first["required_rewards"] == ["red"] and second["history"][0]["text"] == "a red square", (
        "what is to be drawn"
    )
    assert scored(unirl_server, "unirl@URL/#size") == [1.0, None, 1.0], "the first sub-metric"
    assert scored(unirl_server, "unirl@URL/score#size") == [1.0, None, 1.0], "the whole address"
    assert scored(unirl_server, "unirl@URL#size/Aesthetic%20Quality") == [0.5, None, 0.1]


def test_unirl_sees_the_picture_that_the_prompt_shows(unirl_server: ScorerServer, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "source.png")
    edit = rollout(0, None, coloured(1.0), text="make it red")
    edit = replace(edit, prompt=replace(edit.prompt, images=(tmp_path / "source.png",)))
    assert scored(unirl_server, "unirl@URL#size", [edit]) == [2.0]
    assert scored(unirl_server, "unirl@URL#red", [edit]) == [1.0], "the drawing comes last"


def test_rows_that_the_server_cannot_score_are_none_and_counted(unirl_server: ScorerServer) -> None:
    black = rollout(3, None, coloured(0.0))
    reward = RemoteReward(f"unirl@{unirl_server.url}#unread")
    table = score([*ROLLOUTS, black], {"unread": reward})
    assert table.values[3].isnan().all() and table.failures == {"unread": 1} and not table.errors
    table = score(ROLLOUTS, {"broken": RemoteReward(f"unirl@{unirl_server.url}#broken")})
    assert table.values.isnan().all() and "reward 'broken' exceeded 120.0s" in table.errors["broken"]


@pytest.mark.parametrize("text", ["a red square", "a blue one"])
def test_verl_omni_s_protocol(text: str) -> None:
    """The ground truth of verl's own data is what its client sends as prompt."""
    rows = [rollout(0, None, coloured(1.0), answer="no", extra={"reward_model": {"ground_truth": text}}), *ROLLOUTS[1:]]
    with serving(verl_omni) as server:
        assert scored(server, "verl_omni@URL", rows) == [1.0 if "red" in text else 0.5, None, 0.6]
        payload = pickle.loads(server.requests[0][1])
        assert payload["metadata"] == {} and payload["prompts"] == [text, "a red square"]


def test_flow_grpo_s_servers() -> None:
    with serving(geneval) as server:
        assert scored(server, "flow_grpo@URL#geneval") == [1.0, None, 0.0]
        sent = pickle.loads(server.requests[0][1])
        assert sent["meta_datas"][1] == {"prompt": "a red square", "tag": "colors", "include": []}
        assert sent["metadata"] == {"meta_datas": sent["meta_datas"], "only_strict": True}, "as deepgen's reads it"
    with serving(deqa) as server:
        assert scored(server, "flow_grpo@URL#deqa") == [1.0, None, 0.2]


def test_what_json_has_no_form_for_does_not_stop_a_request(unirl_server: ScorerServer) -> None:
    about = {"where": Path("a.png"), "score": float("nan"), "boxes": (1, 2)}
    broken = coloured(1.0)
    broken[1:, 0] = float("nan")
    row = rollout(0, None, broken, text="red \ud83d", extra={"metadata": about})
    assert scored(unirl_server, "unirl@URL#red", [row]) == [1.0]
    (sent,) = json.loads(unirl_server.requests[0][1])["requests"]
    assert sent["metadata"] == {"where": "a.png", "score": None, "boxes": [1, 2]}
    with serving(openrlhf) as server:
        texts = [rollout(0, "yes", answer=["a", Path("b")])]
        assert scored(server, "openrlhf@URL", texts) == [3.0]


def test_openrlhf_s_protocol() -> None:
    with serving(openrlhf) as server:
        texts = [rollout(0, "yes"), rollout(1, None, coloured(0.5)), rollout(2, "perhaps")]
        assert scored(server, "openrlhf@URL/get_reward", texts) == [3.0, None, 7.0]
        path, body = server.requests[0]
        assert path == "/get_reward" and json.loads(body)["labels"] == ["dog", "dog"]


def test_batches_go_side_by_side_and_rows_keep_their_places(unirl_server: ScorerServer) -> None:
    many = [rollout(i, None, coloured(i / 20)) for i in range(20)]
    assert scored(unirl_server, "unirl@URL#red", many, batch_size=3) == [round(i / 20, 2) for i in range(20)]
    sizes = sorted(len(json.loads(body)["requests"]) for _, body in unirl_server.requests)
    assert sizes == [2, 3, 3, 3, 3, 3, 3]
    assert scored(unirl_server, "unirl@URL#red", [ROLLOUTS[1]]) == [None] and len(unirl_server.requests) == 7


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_busy_servers_are_asked_again(status: int) -> None:
    with serving(verl_omni) as server:
        server.replies = [(status, pickle.dumps({"error": "temporary"}))] * 2
        assert scored(server, "verl_omni@URL") == [1.0, None, 0.6] and len(server.requests) == 3


def test_what_cannot_get_better_is_not_asked_again(unirl_server: ScorerServer) -> None:
    reward = RemoteReward(f"unirl@{unirl_server.url}#pikscore")
    with pytest.raises(ChatError, match=r"HTTP 400: .*unknown reward: pikscore. available: \['red'"):
        reward(**shown())
    assert len(unirl_server.requests) == 1 and reward.num_failed_calls == 1


def shown(count: int = 1) -> dict[str, Any]:
    return {
        "images": [coloured(1.0)] * count,
        "prompts": ["red"] * count,
        "completions": [""] * count,
        "answer": [None] * count,
    }


def test_one_batch_that_fails_costs_its_rows_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serving(verl_omni) as server:
        server.replies = [(200, pickle.dumps({"error": "Traceback\nRuntimeError: out of memory"}))]
        reward = RemoteReward(f"verl_omni@{server.url}#ocr", batch_size=2, max_concurrency=1)
        assert reward(**shown(4)) == [None, None, 1.0, 1.0] and reward.num_failed_calls == 1
    assert "reward 'ocr': no score for 2 of 4; the first: 127.0.0.1: the server says: RuntimeError" in caplog.text


def test_the_budget_bounds_a_server_that_hangs() -> None:
    with serving(verl_omni) as server:
        server.hangs.set()
        begin = time.monotonic()
        reward = RemoteReward(f"verl_omni@{server.url}", budget=0.6, timeout=0.25, backoff=0.01)
        with pytest.raises(ChatError, match=r"no answer within|no time left"):
            reward(**shown())
        assert 0.4 < time.monotonic() - begin < 5.0 and len(server.requests) >= 2


class Opens:
    """What a pickle may do to who loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"scores": [1.0, 2.0]}, "expected 1 scores in the answer, one per row, got 2"),
        ({"scores": []}, "expected 1 scores in the answer, one per row, got 0"),
        ({"other": [1.0]}, "expected 1 scores in the answer, one per row, got none"),
        ({"scores": [float("nan")]}, "expected finite numbers as scores, got nan"),
        ({"scores": ["1.0"]}, "expected finite numbers as scores, got '1.0'"),
        ({"scores": [True]}, "expected finite numbers as scores, got True"),
        ({"scores": [1e39]}, "too large for a float32"),
        ({"scores": [10**400]}, "expected finite numbers as scores, got 1000000"),
        ({"scores": (1.0, 2.0)}, "expected 1 scores in the answer, one per row, got 2"),
        ({"scores": torch.ones(1)}, "torch.storage._load_from_bytes, which is no plain value"),
        ([1.0], "got none"),
    ],
)
def test_answers_that_are_none_are_refused_by_name(answer: Any, said: str) -> None:
    with serving(lambda *_: (200, pickle.dumps(answer))) as server, pytest.raises(ChatError, match=said):
        RemoteReward(f"flow_grpo@{server.url}", retries=0)(**shown())


@pytest.mark.parametrize(
    ("codebase", "answer"),
    [
        ("openrlhf", f'{{"rewards": [{10**400}, 0.5]}}'.encode()),
        ("unirl", f'{{"results": [{{"red": {{"red": {10**400}}}}}, {{"red": {{"red": 0.5}}}}]}}'.encode()),
        ("verl_omni", pickle.dumps({"scores": (10**400, 0.5)})),
    ],
)
def test_one_number_that_cannot_be_costs_its_row_alone(codebase: str, answer: bytes) -> None:
    with serving(lambda *_: (200, answer)) as server:
        reward = RemoteReward(f"{codebase}@{server.url}#red")
        assert reward(**shown(2)) == [None, 0.5]
        assert reward.num_failed_calls == 1


def test_an_address_that_leads_nowhere_is_told_in_words() -> None:
    with pytest.raises(ChatError, match=r"scorer\.invalid: gaierror: \S+"):
        RemoteReward("openrlhf@https://scorer.invalid/score", retries=0)(**shown())
    with serving(lambda *_: (200, b"")) as server, pytest.raises(ChatError, match=r"SSLError: .*(version|record)"):
        RemoteReward(f"openrlhf@{server.url.replace('http', 'https')}", retries=0)(**shown())
    with serving(lambda *_: (301, b"")) as server, pytest.raises(ChatError, match="give its target as the address"):
        RemoteReward(f"openrlhf@{server.url}")(**shown())


def test_an_answer_runs_nothing(tmp_path: Path) -> None:
    evil = pickle.dumps({"scores": [Opens(tmp_path / "owned")]})
    with serving(lambda *_: (200, evil)) as server, pytest.raises(ChatError, match=r"io.open, which is no plain value"):
        RemoteReward(f"flow_grpo@{server.url}", retries=0)(**shown())
    assert not (tmp_path / "owned").exists()


def test_answers_have_a_size_limit_and_keys_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_KEY", "sk-secret")
    with serving(lambda *_: (401, b"wrong key sk-secret")) as server:
        reward = RemoteReward(f"unirl@{server.url}#red", api_key_env="SCORER_KEY")
        with pytest.raises(ChatError, match=r"HTTP 401: wrong key \*\*\*"):
            reward(**shown())
        assert server.headers[0]["Authorization"] == "Bearer sk-secret" and "secret" not in repr(vars(reward))
    with serving(lambda *_: (200, b"x" * 300)) as server, pytest.raises(ChatError, match="above 100 bytes"):
        RemoteReward(f"unirl@{server.url}#red", max_bytes=100)(**shown())


def test_a_name_for_reward_funcs(unirl_server: ScorerServer) -> None:
    """Loaded as any other, tried before a run, told in the words of its own server."""
    spec = f"unirl@{unirl_server.url}#size/Aesthetic%20Quality"
    reward = load_reward(spec, budget=5.0)
    assert isinstance(reward, RemoteReward) and reward_name(spec) == reward.__name__ == "size_Aesthetic_Quality"
    assert (reward.kind, reward.budget, reward.transport.timeout) == ("image", 5.0, 2.5)
    assert reward_name("flow_grpo@https://scorer.example:18085") == "scorer.example"
    prompts = [Prompt(id="a", task="t2i", text="red", segments=("image",))]
    wrong = load_reward(f"unirl@{unirl_server.url}#nope")
    kept = {"image_size": 8, "encode": lambda text: list(text.encode()), "timeout": 20.0}
    assert try_rewards({"red": reward}, prompts, **kept) == []
    (line,) = try_rewards({"nope": wrong}, prompts, **kept)
    assert line.startswith("reward 'nope': a trial call before training failed with ChatError: 127.0.0.1: HTTP 400")
    assert "unknown reward: nope. available" in line


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("unirl@http://127.0.0.1:8080", "expected the server's name for the reward behind the address"),
        ("verl@http://127.0.0.1:8080", r"before its address \(unirl, verl_omni, flow_grpo, openrlhf\), got verl@"),
        ("http://127.0.0.1:8080#red", "got none; name it"),
        ("flow_grpo@http://10.1.2.3:18085", "expected https, or this machine, got 10.1.2.3 over plain http"),
        ("openrlhf@https://user:word@host/x", "make it in a function, which names the variable"),
        ("unirl@http://:8080#red", "give a reward server's"),
        ("unirl@https://host:99999#red", "no host or port that there can be"),
    ],
)
def test_addresses_that_cannot_be_are_refused_before_a_run(spec: str, said: str) -> None:
    with pytest.raises(RewardSpecError, match=said):
        load_reward(spec)
    (problem,) = reward_problems("reward_funcs", [spec], ["cycle"])
    assert problem.startswith("reward_funcs: ") and "user:word" not in problem


def test_reward_funcs_take_addresses() -> None:
    assert reward_problems("reward_funcs", ["cycle", "isolated@unirl@https://host:8080#red"], ["cycle"]) == []
    with pytest.raises(RewardSpecError, match="expected batch_size >= 1"):
        RemoteReward("unirl@https://host#red", batch_size=0)


def test_what_is_sent_and_read_is_a_pickle_of_plain_values() -> None:
    """What Python's own writes in any protocol, NumPy's numbers among it, and what it reads."""
    value = {
        "images": [b"\xff\x00", b""],
        "prompts": ["née 二", "", "\ud800"],
        "m": {"a": [1, -300, 10**30, 0.5], "b": None},
    }
    assert pickle.loads(dumps(value)) == value == loads(dumps(value))
    numbers = [1, 10**20, -1.5, True, None, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ["a", "a"], {"k": {}}]
    rows = np.arange(6, dtype=">f4").reshape(2, 3)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert loads(pickle.dumps(numbers, protocol)) == numbers
        assert loads(pickle.dumps({"x": rows, "y": rows.T, "z": np.float16(0.5)}, protocol)) == {
            "x": rows.tolist(),
            "y": rows.T.tolist(),
            "z": 0.5,
        }
    shared = [1.0]
    assert loads(pickle.dumps([shared, shared])) == [shared, shared]
    with pytest.raises(TypeError, match="expected plain values, got set"):
        dumps([{1}])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("value", [{1}, np.array(["a"]), np.array([None]), Path("x"), OrderedDict(a=1)], ids=repr)
def test_other_pickles_are_refused_by_name(value: Any, protocol: int) -> None:
    with pytest.raises(ValueError, match="expected a pickle of plain values, got "):
        loads(pickle.dumps(value, protocol))


def test_damaged_pickles_are_refused_and_nothing_else_happens() -> None:
    generator = random.Random(0)
    whole = [
        pickle.dumps({"scores": [0.5, np.float32(0.25)], "x": np.ones(3)}),
        pickle.dumps({"outputs": [1.0, "a"]}, 0),
    ]
    refused = 0
    for _ in range(1500):
        data = bytearray(generator.choice(whole))
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            loads(bytes(data[: generator.randint(0, len(data))]))
        except ValueError:
            refused += 1
    assert refused > 1000
