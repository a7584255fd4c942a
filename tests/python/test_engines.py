"""The engines' processors against a recomputation of every row from nothing, as requests join, leave, move and draft.

vLLM and SGLang themselves are used where they are installed. Everywhere the same tests run on doubles: the side of the
protocol that is the engine's, written anew here, with none of its machinery.
"""

from __future__ import annotations

import enum
import math
import pickle
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.integrations import _requests, sglang, vllm
from abjure.refuse import ForbiddenPhrases, RefusalTokens, logit

INF = math.inf
VOCAB = 10
PHRASES = [[5, 7, 9, 4], [7, 9, 2], [3], [9, 9]]
quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def gate(**options: Any) -> RefusalTokens:
    return RefusalTokens({"unsafe": 5, "unknown": [6, 8]}, threshold=logit(0.15), bias=0.5, elsewhere="mask", **options)


#: Profile to a function that makes its processors for one row, given its prompt's length (None: an engine's).
PROFILES = {
    "phrases": lambda n=None: [
        ForbiddenPhrases(PHRASES, VOCAB, mode="prefix", penalty=2.0, prompt_length=n),
    ],
    "gate": lambda n=None: [gate(on_no_fire="free", prompt_length=n)],
    "both": lambda n=None: [
        gate(prompt_length=n),
        ForbiddenPhrases(PHRASES, VOCAB, scope="all", prompt_length=n),
    ],
    "off": lambda n=None: [],
}


def expected(name: str | None, prompt: list[int], output: list[int], row: torch.Tensor) -> torch.Tensor:
    """The row by itself, through the public call, with new processors."""
    out = row.clone()[None]
    for processor in PROFILES[name or "phrases"](len(prompt)):
        processor(torch.tensor([prompt + output]), out)
    return out[0]


# The doubles


class Move(enum.Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


@dataclass(frozen=True)
class Update:
    batch_size: int
    removed: list[int]
    added: list[tuple[int, Any, list[int] | None, list[int]]]
    moved: list[tuple[int, int, Any]]


class V1Base:
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        raise NotImplementedError


class V2Base:
    def __init__(self, vllm_config: Any, req_states: Any) -> None: ...


@dataclass
class Params:
    extra_args: dict[str, Any] | None = None


@dataclass
class Context:
    expanded_idx_mapping: Any
    idx_mapping: Any
    idx_mapping_np: Any
    expanded_local_pos: Any
    input_ids: Any
    pos: Any
    seq_lens_upper_bound_np: Any


def modules(monkeypatch: pytest.MonkeyPatch, **members: dict[str, Any]) -> None:
    """Puts modules where an engine's would be imported from."""
    for path, found in members.items():
        path = path.replace("__", ".")
        for part in range(path.count(".") + 1):
            parent = ".".join(path.split(".")[: part + 1])
            if parent not in sys.modules or not getattr(sys.modules[parent], "double", False):
                made = types.ModuleType(parent)
                made.double = True  # type: ignore[attr-defined]
                made.__path__ = []
                monkeypatch.setitem(sys.modules, parent, made)
        vars(sys.modules[path]).update(found)
        if "." in path:
            setattr(sys.modules[path.rpartition(".")[0]], path.rpartition(".")[2], sys.modules[path])


@dataclass
class Engine:
    v1: Any
    v2: Any
    update: Any
    move: Any
    params: Any
    context: Any


@pytest.fixture(params=["double", "installed"])
def engine(request, monkeypatch):
    if request.param == "installed":
        pytest.importorskip("vllm")
        from vllm import SamplingParams
        from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
        from vllm.v1.worker.gpu.sample import logits_processor as v2

        return Engine(
            LogitsProcessor,
            v2.LogitsProcessor,
            BatchUpdate,
            MoveDirectionality,
            lambda name: SamplingParams(extra_args=None if name is None else {"abjure": name}),
            v2.LogitsContext,
        )
    modules(
        monkeypatch,
        vllm__v1__sample__logits_processor={"LogitsProcessor": V1Base},
        vllm__v1__worker__gpu__sample__logits_processor={"LogitsProcessor": V2Base},
        vllm__envs={"VLLM_USE_V2_MODEL_RUNNER": None},
        vllm__triton_utils={"HAS_TRITON": False},
    )
    return Engine(
        V1Base, V2Base, Update, Move, lambda name: Params(None if name is None else {"abjure": name}), Context
    )


def profiles() -> dict[str, Any]:
    return {name: make() for name, make in PROFILES.items()}


# vLLM, V1

token = st.integers(0, VOCAB - 1)
prompts = st.lists(token, max_size=6)
names = st.sampled_from([None, *PROFILES])


@pytest.mark.parametrize("own_order", [False, True])
@given(data=st.data())
@quick
def test_v1_follows_any_batch(engine, own_order, data):
    """Removals, additions to holes and over live requests, condensing moves and swaps, in one step or many."""
    processor = vllm.processor("Guard", profiles(), interface="v1")(None, torch.device("cpu"), False)
    batch: list[Any] = []  # what is at each index: (profile, prompt, live output)
    for _ in range(data.draw(st.integers(1, 6))):
        removed = data.draw(st.sets(st.integers(0, len(batch) - 1))) if batch else set()
        slots: dict[int, Any] = {i: r for i, r in enumerate(batch) if i not in removed}
        holes, added, moved = sorted(removed), [], []
        for _ in range(data.draw(st.integers(0, 3))):
            name, prompt = data.draw(names), data.draw(prompts)
            output = data.draw(st.lists(token, max_size=4))
            replaced = data.draw(st.booleans()) and any(i in slots for i in range(len(batch)))
            at = min(slots) if replaced else holes.pop(0) if holes else max(slots, default=-1) + 1
            slots[at] = (name, prompt, output)
            added.append((at, engine.params(name), prompt or None, output))
        while holes and slots and holes[0] < max(slots):
            last, hole = max(slots), holes.pop(0)
            slots[hole] = slots.pop(last)
            moved.append((last, hole, engine.move.UNIDIRECTIONAL))
        for _ in range(data.draw(st.integers(0, 2))) if len(slots) > 1 else ():
            a, b = data.draw(st.lists(st.sampled_from(sorted(slots)), min_size=2, max_size=2, unique=True))
            slots[a], slots[b] = slots[b], slots[a]
            moved.append((a, b, engine.move.SWAP))
        batch = [slots[i] for i in range(len(slots))]
        left = [i for i in removed if all(i != a[0] for a in added)]
        changed = left or added or moved
        processor.update_state(
            engine.update(batch_size=len(batch), removed=left, added=added, moved=moved) if changed else None
        )
        logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
        wanted = [expected(n, p, o, z) for (n, p, o), z in zip(batch, logits, strict=True)]
        out = processor.apply(logits)
        assert out is logits
        assert not wanted or torch.equal(out, torch.stack(wanted))
        for _, _, output in batch:
            output.append(data.draw(token))  # the engine's list grows; the processor is not told


def test_v1_over_the_engines_own_batch(engine, monkeypatch):
    """vLLM's persistent batch makes the updates: adds, removals, condensing and swaps."""
    pytest.importorskip("vllm")
    if engine.v1 is V1Base:
        pytest.skip("needs the installed vLLM")
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    # Without a GPU there is no pinned memory, which vLLM does not find out where no platform is detected.
    for module in [m for name, m in sys.modules.items() if name.startswith("vllm.") and hasattr(m, "PIN_MEMORY")]:
        monkeypatch.setattr(module, "PIN_MEMORY", False)
    made = vllm.processor("Guard", profiles(), interface="v1")(None, torch.device("cpu"), False)
    batch = InputBatch(
        max_num_reqs=8,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=VOCAB,
        block_sizes=[4],
        max_num_blocks_per_req=[16],
        logitsprocs=LogitsProcessors([made]),
        logitsprocs_need_output_token_ids=True,
    )
    rng, live = np.random.default_rng(0), {}
    for step in range(40):
        for name in [n for n in live if rng.random() < 0.2]:
            batch.remove_request(name)
            del live[name]
        while len(live) < 8 and rng.random() < 0.6:
            profile = [None, *PROFILES][rng.integers(len(PROFILES) + 1)]
            state = CachedRequestState(
                req_id=f"{step}-{len(live)}-{rng.integers(1 << 30)}",
                prompt_token_ids=rng.integers(0, VOCAB, rng.integers(1, 6)).tolist(),
                mm_features=[],
                sampling_params=engine.params(profile),
                generator=None,
                block_ids=([],),
                num_computed_tokens=0,
                output_token_ids=[],
            )
            batch.add_request(state)
            live[state.req_id] = (profile, state)
        batch.condense()
        if len(live) > 1 and rng.random() < 0.5:
            batch.swap_states(0, len(live) - 1)
        batch.refresh_metadata()
        order = [live[name] for name in batch.req_ids[: len(live)]]
        logits = torch.from_numpy(rng.normal(size=(len(order), VOCAB)).astype(np.float32))
        wanted = [
            expected(n, s.prompt_token_ids, s.output_token_ids, z) for (n, s), z in zip(order, logits, strict=True)
        ]
        out = made.apply(logits)
        assert not wanted or torch.equal(out, torch.stack(wanted)), step
        for _, state in order:
            state.output_token_ids.append(int(rng.integers(0, VOCAB)))


def test_v1_declares_itself_and_refuses_placeholders(engine):
    made = vllm.processor("Guard", profiles(), interface="v1", default="gate")
    assert issubclass(made, engine.v1)
    assert not issubclass(made, engine.v2)
    processor = made(None, torch.device("cpu"), False)
    assert processor.is_argmax_invariant() is False
    processor.update_state(
        engine.update(batch_size=1, removed=[], added=[(0, engine.params("both"), [1], [5, -1])], moved=[])
    )
    with pytest.raises(ArgumentError, match="asynchronous"):
        processor.apply(torch.zeros(1, VOCAB))
    made.validate_params(engine.params("off"))
    made.validate_params(engine.params(None))
    with pytest.raises(ValueError, match="'phrases'"):
        made.validate_params(engine.params("unheard of"))


# vLLM, V2


class Buffer:
    """What a tensor kept on device and host is read by."""

    def __init__(self, values: torch.Tensor) -> None:
        self.gpu, self.np = values, values.numpy()


@dataclass
class States:
    device: Any
    max_num_reqs: int
    vocab_size: int
    all_token_ids: Buffer
    prompt_len: Buffer
    prefill_len: Buffer
    total_len: Buffer


@given(data=st.data())
@quick
def test_v2_follows_slots_rows_and_drafts(engine, data):
    slots = 5
    store = [torch.full((slots, 32), 9, dtype=torch.int32), *(torch.zeros(slots, dtype=torch.int32) for _ in range(3))]
    states = States(torch.device("cpu"), slots, VOCAB, *map(Buffer, store))
    tokens, prompt_len, _, total_len = store
    processor = vllm.processor("Guard", profiles(), interface="v2")(None, states)
    live: dict[int, Any] = {}
    for _ in range(data.draw(st.integers(1, 5))):
        for slot in data.draw(st.sets(st.sampled_from(range(slots)), max_size=3)):
            # No call tells that a slot was given up: the next request takes it over.
            name, prompt = data.draw(names), data.draw(st.lists(token, min_size=1, max_size=6))
            output = data.draw(st.lists(token, max_size=3))  # after preemption a request comes back with its response
            live[slot] = (name, prompt, output)
            prompt_len[slot] = len(prompt)
            assert processor.add_request(slot, engine.params(name)) == (name != "off")
        processor.apply_staged_writes()
        order = data.draw(st.permutations(sorted(live)))
        rows, wanted, mapping, local, inputs, pos = [], [], [], [], [], []
        for slot in order:
            name, prompt, output = live[slot]
            whole = prompt + output
            tokens[slot, : len(whole)] = torch.tensor(whole, dtype=torch.int32)
            tokens[slot, len(whole) :] = 9
            total_len[slot] = len(whole)
            drafts = data.draw(st.lists(token, max_size=3))
            for i in range(len(drafts) + 1):
                row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(rows) + 31 * slot))
                rows.append(row)
                wanted.append(expected(name, prompt, output + drafts[:i], row))
                mapping.append(slot)
                local.append(i)
                inputs.append(([whole[-1], *drafts])[i])
                pos.append(len(whole) - 1 + i)
        if not rows:
            continue
        context = engine.context(
            expanded_idx_mapping=torch.tensor(mapping),
            idx_mapping=torch.tensor(order),
            idx_mapping_np=np.array(order),
            expanded_local_pos=torch.tensor(local, dtype=torch.int32),
            input_ids=torch.tensor(inputs, dtype=torch.int32),
            pos=torch.tensor(pos),
            seq_lens_upper_bound_np=np.array(pos) + 1,
        )
        assert torch.equal(processor.apply(torch.stack(rows), context), torch.stack(wanted))
        for slot in order:
            live[slot][2].append(data.draw(token))


def test_v2_drops_rows_within_the_prompt_and_leaves_slots_never_used(engine):
    states = States(
        torch.device("cpu"), 2, VOCAB, *(Buffer(torch.zeros(*s, dtype=torch.int32)) for s in ((2, 8), (2,), (2,), (2,)))
    )
    states.prompt_len.gpu[0] = 5
    made = vllm.processor("Guard", profiles(), interface="v2")
    assert issubclass(made, engine.v2)
    assert not issubclass(made, engine.v1)
    processor = made(None, states)
    processor.add_request(0, engine.params("both"))
    rows = torch.tensor([0, 1])
    context = engine.context(rows, rows, rows.numpy(), rows * 0, rows * 0, torch.tensor([2, 3]), np.array([3, 4]))
    logits = torch.randn(2, VOCAB)
    assert torch.equal(processor.apply(logits.clone(), context), logits)


def test_the_interface_is_what_the_engine_will_load(engine, monkeypatch):
    if engine.v1 is not V1Base:
        pytest.skip("of the double, whose settings can be set")
    triton, envs = sys.modules["vllm.triton_utils"], sys.modules["vllm.envs"]
    for forced, has_triton, wanted in (
        (None, False, "v1"),
        (None, True, "v2"),
        (True, False, "v2"),
        (False, True, "v1"),
    ):
        envs.VLLM_USE_V2_MODEL_RUNNER, triton.HAS_TRITON = forced, has_triton
        assert vllm.interface() == wanted
        assert issubclass(vllm.processor("Guard", []), engine.v2 if wanted == "v2" else engine.v1)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.logits_processor", None)
    assert vllm.interface() == "v1"
    with pytest.raises(ArgumentError, match="interface"):
        vllm.processor("Guard", [], interface="v3")


def test_installed_vllm_loads_the_one_and_refuses_the_other():
    pytest.importorskip("vllm")
    from vllm.v1.sample.logits_processor import build_logitsprocs
    from vllm.v1.worker.gpu.sample.logits_processor import (
        build_custom_logits_processors,
        build_custom_logits_processors_params_validator,
    )

    one = vllm.processor("One", profiles(), interface="v1")
    two = vllm.processor("Two", profiles(), interface="v2")
    config = types.SimpleNamespace(speculative_config=None, scheduler_config=types.SimpleNamespace(max_num_seqs=4))
    states = types.SimpleNamespace(
        device="cpu", max_num_reqs=2, vocab_size=VOCAB, all_token_ids=0, prompt_len=0, prefill_len=0, total_len=0
    )
    built = build_custom_logits_processors(config, states, False, [two])
    assert [type(p) for p in built] == [two]
    with pytest.raises(ValueError, match="not a subclass"):
        build_custom_logits_processors(config, states, False, [one])
    with pytest.raises(ValueError, match="not a subclass"):
        build_logitsprocs(config, torch.device("cpu"), False, False, [two])
    build_custom_logits_processors_params_validator([two])


Guard: Any = None
calls: list[str] = []


def test_classes_travel_by_name_and_build_late(engine):
    global Guard
    calls.clear()

    def build() -> list[Any]:
        calls.append("built")
        return [ForbiddenPhrases(PHRASES)]

    Guard = vllm.processor("Guard", {"late": build}, interface="v1")
    assert pickle.loads(pickle.dumps(Guard)) is Guard
    Guard.validate_params(engine.params("late"))
    assert not calls, "a front end that only checks names builds no tables"
    processor = Guard(None, torch.device("cpu"), False)
    processor.update_state(engine.update(batch_size=1, removed=[], added=[(0, engine.params(None), [1], [])], moved=[]))
    for _ in range(2):
        assert processor.apply(torch.zeros(1, VOCAB))[0, 3] == -INF
    assert calls == ["built"]


# SGLang


class CustomLogitProcessor:
    """The double's base class."""


class Request:
    def __init__(self, prompt: list[int], output: list[int]) -> None:
        self.origin_input_ids, self.output_ids = prompt, output


@pytest.fixture(params=["double", "installed"])
def sgl(request, monkeypatch):
    if request.param == "double":
        modules(
            monkeypatch,
            sglang__srt__sampling__custom_logit_processor={"CustomLogitProcessor": CustomLogitProcessor},
        )
        return CustomLogitProcessor
    return pytest.importorskip("sglang.srt.sampling.custom_logit_processor").CustomLogitProcessor


@given(rows=st.lists(st.tuples(names, prompts, st.lists(token, max_size=5)), min_size=1, max_size=5))
@quick
def test_sglang_rows_are_those_of_their_requests(sgl, rows):
    made = sglang.processor("Guard", profiles())
    assert issubclass(made, sgl)
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([expected(n, p, o, z) for (n, p, o), z in zip(rows, logits, strict=True)])
    given = [{**({} if n is None else {"abjure": n}), "__req__": Request(p, o)} for n, p, o in rows]
    assert torch.equal(made()(logits, given), wanted)


def test_sglang_refuses_what_it_cannot_see(sgl, monkeypatch):
    processor = sglang.processor("Guard", profiles())()
    shown = {"__req__": Request([1], [])}
    for shown_list, error in (
        ([shown], ShapeError),
        (None, ShapeError),
        ([shown, None], ArgumentError),
        ([shown, {"abjure": "both"}], ArgumentError),
        ([shown, shown], ArgumentError),
        ([shown, {**shown, "abjure": "unheard of"}], ArgumentError),
    ):
        logits = torch.zeros(2, VOCAB)
        with pytest.raises(error):
            processor(logits, shown_list)
        assert not logits.any()
    schedule = types.SimpleNamespace(disable_overlap_schedule=False)
    modules(monkeypatch, sglang__srt__runtime_context={"get_schedule": lambda: schedule})
    with pytest.raises(ArgumentError, match="overlap"):
        processor(torch.zeros(1, VOCAB), [shown])
    schedule.disable_overlap_schedule = True
    processor(torch.zeros(1, VOCAB), [shown])


def test_installed_sglang_sends_the_class_as_a_string():
    base = pytest.importorskip("sglang.srt.sampling.custom_logit_processor").CustomLogitProcessor
    global Guard
    Guard = sglang.processor("Guard", [ForbiddenPhrases(PHRASES)])
    there = base.from_str(Guard.to_str())
    out = there(torch.zeros(1, VOCAB), [{"__req__": Request([1], [7, 9])}])
    assert torch.nonzero(out[0] == -INF)[:, 0].tolist() == [2, 3, 9]


# Phrases in bytes


def test_bytes_reach_as_far_as_they_must():
    """Tokens without text may stand in a phrase in any number: the whole context counts then, here and in drafts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    a, b, c, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "c", "<eos>"))
    made = ForbiddenPhrases(["abc"], tokenizer=tokenizer, mode="bytes", scope="all")
    width = len(tokenizer)
    rows = [([a], [b]), ([a, *[eos] * 20], [b, *[eos] * 9]), ([a], [c]), ([], [])]
    wanted = [bool(i < 2) for i in range(4)]
    found = _requests.Profiles([made]).write_(torch.zeros(4, width), [row(o, p) for p, o in rows])
    assert [bool(r[c] == -INF) for r in found] == wanted
    alone = [
        ForbiddenPhrases(["abc"], tokenizer=tokenizer, mode="bytes", scope="all")(
            np.array([p + o]), np.zeros((1, width))
        )
        for p, o in rows[:3]
    ]
    assert [bool(r[0, c] == -INF) for r in alone] == wanted[:3]


# Bad input, whatever the engine


def test_bad_profiles():
    for lists, options, error in (
        ({}, {}, ArgumentError),
        ({1: []}, {}, ArgumentError),
        ([object()], {}, DTypeError),
        ("text", {}, DTypeError),
        (3, {}, DTypeError),
        ({"a": []}, {"default": "b"}, ArgumentError),
    ):
        with pytest.raises(error):
            _requests.Profiles(lists, **options)
    late = _requests.Profiles({"a": lambda: [object()]})
    with pytest.raises(DTypeError):
        late["a"]
    with pytest.raises(ArgumentError, match="name"):
        _requests.engine_class("no name", object, {}, None, 1)


def row(output: list[int], prompt: list[int] | None = None) -> _requests.Row:
    return _requests.Row("default", prompt or [], output)


@pytest.mark.parametrize(
    ("processors", "logits", "error"),
    [
        ([ForbiddenPhrases(PHRASES, 12)], torch.zeros(1, VOCAB), ShapeError),
        ([ForbiddenPhrases(PHRASES)], torch.zeros(1, 4), ArgumentError),
        ([RefusalTokens({"a": 11})], torch.zeros(1, VOCAB), ArgumentError),
        ([ForbiddenPhrases(PHRASES)], torch.zeros(2, VOCAB), ShapeError),
        ([ForbiddenPhrases(PHRASES)], torch.zeros(VOCAB), ShapeError),
        ([ForbiddenPhrases([[i] for i in range(VOCAB)])], torch.zeros(1, VOCAB), DegenerateError),
        (
            [RefusalTokens({"a": 1}, bias=-INF)],
            torch.full((1, VOCAB), -INF).index_fill(1, torch.tensor([1]), 0),
            DegenerateError,
        ),
        ([ForbiddenPhrases(PHRASES)], torch.full((1, VOCAB), -INF), DegenerateError),
        ([ForbiddenPhrases([[1, 2]])], torch.full((1, 200), -INF), DegenerateError),
        ([RefusalTokens({"a": 1}, position="first")], torch.full((1, VOCAB), -INF), DegenerateError),
        ([RefusalTokens({"a": 1}, threshold=0.0)], torch.full((1, VOCAB), math.nan), NonFiniteError),
        ([ForbiddenPhrases([[1]])], torch.full((1, VOCAB), math.nan), NonFiniteError),
    ],
)
def test_bad_logits_are_clear_errors_and_write_nothing(processors, logits, error):
    before = logits.clone()
    with pytest.raises(error):
        _requests.Profiles(processors).write_(logits, [row([])])
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    if error is not ShapeError:  # the same through the public call
        for processor in processors:
            with pytest.raises(error):
                processor(np.zeros((len(logits), 1), dtype=np.int64), logits)


def test_a_row_late_in_its_response_is_checked_too():
    gated = RefusalTokens({"a": 1}, prompt_length=1)
    with pytest.raises(DegenerateError, match="row 1"):
        gated(torch.tensor([[4, 5], [4, 6]]), torch.tensor([[0.0, -INF], [-INF, -INF]]))
    wide = torch.full((1, 300), -INF)
    wide[0, 299] = 0.0
    assert torch.equal(gated(torch.tensor([[4, 5]]), wide.clone()), wide), "one token far out is enough"


@given(st.lists(st.lists(token, min_size=1, max_size=2), min_size=1, max_size=25, unique_by=tuple), st.lists(token))
@quick
def test_what_is_written_is_a_distribution_or_an_error(phrases, output):
    for dead_end in ("raise", "eos"):
        processor = ForbiddenPhrases(
            [p for p in phrases if p != [0]] or [[1]], VOCAB, eos_token_id=0, dead_end=dead_end
        )
        logits = torch.randn(1, VOCAB)
        logits[0, 5:] = -INF
        try:
            out = _requests.Profiles([processor]).write_(logits, [row(output)])
        except DegenerateError:
            assert dead_end == "raise"
        else:
            assert torch.softmax(out, -1).isfinite().all()


def test_rows_elsewhere_are_picked_and_put_back(monkeypatch):
    """On another device the rows of a profile go together, once."""
    found = _requests.Profiles({"a": [ForbiddenPhrases(PHRASES)], "b": [ForbiddenPhrases([[1]])]})
    rows = [_requests.Row("ab"[i % 2], [], [7, 9]) for i in range(5)]
    here = found.write_(torch.zeros(5, VOCAB), rows)
    monkeypatch.setattr(_requests, "_parts", lambda scores, rows: [rows])
    assert torch.equal(found.write_(torch.zeros(5, VOCAB), rows), here)
    assert found.write_(torch.zeros(1, VOCAB), [None]).eq(0).all()
