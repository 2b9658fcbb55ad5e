"""The table of streams that are continued, line by line: two real servers behind a real service.

A stream is taken undisturbed, and again while its server is cut off in the middle of it: the client
must not be able to tell.  Where the table says no, the stream must end in an event that says why.
Between the service and each server stands a relay that breaks the connection at a certain byte; a
server is killed for good in one test, as starting another takes most of a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import xllm_plugin.service
from xllm_plugin.bench.peers import PeerServer, xllm_server
from xllm_plugin.instance.resumption import RESUME_PATH
from xllm_plugin.models import prepare
from xllm_plugin.service.scale_out.server import GENERATE_PATH
from xllm_plugin.testing.dialogues import LOOSE_WEATHER_TOOL
from xllm_plugin.testing.relay import Cut
from xllm_plugin.testing.relayed_fleet import PATIENCE_S, READY_TIMEOUT_S, RelayedFleet
from xllm_plugin.testing.streams import Said, differences, events_in, is_same, say_together

README = Path(xllm_plugin.service.__file__).parent / "README.md"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"

# -- the lines of the table, as README has them -------------------------------------------------

GREEDY = "completions, chat, greedy"
SEEDED = "the same, sampled with a seed"
SAMPLED = "the same, sampled without a seed"
STOPS = "stop tokens, `min_tokens`, `max_tokens`, `stream_interval`"
STRINGS = "stop strings"
COUNTS = "log probabilities, usage (also in every event)"
BIASES = "logit bias, allowed tokens"
PENALTIES = "penalties, bad words, repetition detection"
GRAMMARS = "structured outputs, `response_format`"
PARSERS = "tools (`auto`, required, named), reasoning parsers"
MEDIA = "images and other media in the prompt"
PROMISES = "promises in `vllm_xargs`"
ARGUMENTS = "thinking budget, watermarking, extra arguments (`vllm_xargs`) but promises"
SEVERAL = "`n` or `best_of` over 1, beam search, several prompts, echo of a completion"
HIDDEN = "`include_reasoning: false`"
INTERFACES = "responses, messages, audio; any stream of an HTTP/1.0 client"
OTHERS = "by an instance with neither, or with a `--scheduler-cls` of another"

# -- requests -----------------------------------------------------------------------------------

END_OF_SENTENCE = 30
"""SmolLM2's full stop."""
EMOJI = "😀😃😄😁😆😅🤣😂🙂🙃😉😊😇🥰😍🤩😘"
"""Two and more tokens each: streams are cut in the middle of characters."""
STORY = "Once upon a time"
USAGE = {"stream_options": {"include_usage": True}}
RUNNING_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
IDS = {"return_token_ids": True}
A_CALL = (
    r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]{3,9}"\}\}\n'
    r"</tool_call>"
)
NAMED_TOOL = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}


EARLY = Cut(2)
AT_BORDER = Cut(num_bytes=len("\r\n"))
"""After one event, and the end of its chunk: what is passed on as it comes can only end there."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request.

    Attributes:
        line: of the table.
        path: where it goes.
        body: what is not the same for all.
        shows: fields of `Said` that must not be empty, or nothing was tested.
        why: part of the error at its end, where it is not continued.
        cut: where it is not continued.
        is_http_1_0: of its client.
    """

    line: str
    path: str
    body: dict[str, Any]
    shows: tuple[str, ...] = ("text",)
    why: str = ""
    cut: Cut = EARLY
    is_http_1_0: bool = False


def chat(line: str, question: Any, shows: tuple[str, ...] = ("text",), **changes: Any) -> Case:
    """A chat whose template ends the model's thoughts."""
    messages = [{"role": "user", "content": question}]
    return Case(line, CHAT, {"messages": messages, "max_tokens": 24, **changes}, shows)


def thinking(line: str, question: str, shows: tuple[str, ...], **changes: Any) -> Case:
    """A chat that begins with reasoning."""
    return chat(line, question, shows, chat_template_kwargs={"thinks": True}, **changes)


def completion(
    line: str, prompt: Any = STORY, shows: tuple[str, ...] = ("text",), **changes: Any
) -> Case:
    return Case(line, COMPLETION, {"prompt": prompt, "max_tokens": 20, **changes}, shows)


def refused(case: Case, why: str, cut: Cut = EARLY) -> Case:
    return Case(case.line, case.path, case.body, (), why, cut)


# A red dot.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)
QUESTION = [
    {"type": "image_url", "image_url": {"url": PICTURE}},
    {"type": "text", "text": "What is to be seen here?"},
]

EXACT = {
    "a chat": chat(GREEDY, "Tell me about Zürich.", **USAGE),
    "a completion": completion(GREEDY, **USAGE, **IDS),
    "a prompt of tokens": completion(GREEDY, [1000, 1001, 1002]),
    "characters of several tokens": completion(GREEDY, EMOJI, logprobs=1),
    # The first block of the KV cache, of 128 tokens on a CPU, ends within the output.
    "output that is cached": completion(GREEDY, [*range(1000, 1123)], min_tokens=20),
    "a seed": completion(
        SEEDED, shows=("log_probs",), seed=7, temperature=1.0, top_p=0.9, logprobs=1
    ),
    "a chat with a seed": chat(SEEDED, "Name a colour.", seed=3, temperature=1.5, top_k=50),
    "a stop string": completion(STRINGS, stop=["there was", "e wa"], min_tokens=3),
    "a stop string that is shown": completion(
        STRINGS, stop=[" and"], include_stop_str_in_output=True, max_tokens=60
    ),
    "a stop token": completion(STOPS, stop_token_ids=[END_OF_SENTENCE], max_tokens=60),
    "a least length": completion(STOPS, stop_token_ids=[END_OF_SENTENCE], min_tokens=16, **USAGE),
    "several tokens an event": completion(STOPS, stream_interval=4, max_tokens=30, **IDS),
    "log-probs of a chat": chat(
        COUNTS, "Name a colour.", ("text", "log_probs"), logprobs=True, top_logprobs=3
    ),
    "log-probs of a completion": completion(COUNTS, shows=("log_probs",), logprobs=2),
    "usage in every event": completion(COUNTS, shows=("usage",), **RUNNING_USAGE, **IDS),
    "usage in every event of a chat": chat(
        COUNTS, "Count to ten.", ("usage",), **RUNNING_USAGE, **IDS
    ),
    "all penalties": completion(
        PENALTIES, frequency_penalty=0.8, presence_penalty=0.4, repetition_penalty=1.1
    ),
    "bad words": completion(PENALTIES, bad_words=[" the", " was"]),
    "a logit bias": completion(BIASES, logit_bias={str(END_OF_SENTENCE): 4.0}),
    "allowed tokens": completion(BIASES, allowed_token_ids=[*range(1000, 1200)], logprobs=2),
    "a repetition that ends it": completion(
        PENALTIES,
        "la la la la la la la la",
        repetition_detection={"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 6},
        max_tokens=40,
    ),
    "a JSON schema": chat(
        GRAMMARS, "A person as JSON.", structured_outputs={"json": SCHEMA}, max_tokens=40
    ),
    "a response format and a penalty": chat(
        GRAMMARS,
        "A person as JSON.",
        response_format=RESPONSE_FORMAT,
        max_tokens=40,
        frequency_penalty=0.3,
    ),
    "a regular expression and a seed": completion(
        GRAMMARS, "A number.", structured_outputs={"regex": "[0-9]{8,12}"}, seed=3, temperature=1.5
    ),
    "a named tool": chat(
        PARSERS,
        "Weather in Paris?",
        ("tool_calls",),
        tools=[LOOSE_WEATHER_TOOL],
        tool_choice=NAMED_TOOL,
    ),
    "a required tool": chat(
        PARSERS,
        "Weather in Paris?",
        ("tool_calls",),
        tools=[LOOSE_WEATHER_TOOL],
        tool_choice="required",
        max_tokens=40,
    ),
    "a tool of its own accord": chat(
        PARSERS,
        "Weather in Paris?",
        ("tool_calls",),
        tools=[LOOSE_WEATHER_TOOL],
        structured_outputs={"regex": A_CALL},
        max_tokens=60,
    ),
    "reasoning": thinking(
        PARSERS, "Name a colour.", ("reasoning", "text"), max_tokens=60, **USAGE, **IDS
    ),
    "reasoning, then JSON": thinking(
        PARSERS,
        "A person as JSON.",
        ("reasoning", "text"),
        structured_outputs={"json": SCHEMA},
        max_tokens=90,
    ),
    "reasoning, then a tool": thinking(
        PARSERS,
        "Weather in Paris?",
        ("reasoning", "tool_calls"),
        tools=[LOOSE_WEATHER_TOOL],
        tool_choice="required",
        max_tokens=90,
    ),
    "an image": chat(MEDIA, QUESTION, **USAGE),
    "a promise": completion(PROMISES, vllm_xargs={"xllm_tpot_ms": 90}),
}
"""By name: the stream is the undisturbed one."""

SAMPLE = {**IDS, **USAGE, "ignore_eos": True, "skip_special_tokens": False}
MAYBE = {
    "a sample": completion(
        SAMPLED, shows=("token_ids", "log_probs"), temperature=1.0, logprobs=1, **SAMPLE
    ),
    "a sampled chat": chat(
        SAMPLED,
        "Name a colour.",
        ("token_ids", "log_probs"),
        temperature=1.0,
        logprobs=True,
        **SAMPLE,
    ),
}
"""By name: the stream goes on as a sample would."""

REFUSED = {
    "a thinking budget": refused(
        thinking(ARGUMENTS, "Name a colour.", (), thinking_token_budget=4, max_tokens=40),
        "A stream with a thinking token budget cannot be continued",
    ),
    "watermarking": refused(
        completion(ARGUMENTS, watermarking=True), "A stream with watermarking cannot be continued"
    ),
    "extra arguments": refused(
        completion(ARGUMENTS, vllm_xargs={"other": 1}),
        "A stream with extra arguments cannot be continued",
    ),
    "n": refused(chat(SEVERAL, "Name a colour.", n=2, temperature=1.0), "`n` is not 1", AT_BORDER),
    "best_of": refused(completion(SEVERAL, best_of=2), "`best_of` is not 1", AT_BORDER),
    "a beam search": refused(
        chat(SEVERAL, "Name a colour.", use_beam_search=True), "it is a beam search", AT_BORDER
    ),
    "several prompts": refused(
        completion(SEVERAL, ["One", "Two"]), "it has several prompts", AT_BORDER
    ),
    "an echo": refused(completion(SEVERAL, echo=True), "it echoes its prompt", AT_BORDER),
    "hidden reasoning": refused(
        thinking(HIDDEN, "Name a colour.", (), include_reasoning=False, max_tokens=60),
        "`include_reasoning` is false",
        AT_BORDER,
    ),
    "a response": Case(
        INTERFACES,
        RESPONSES,
        {"input": "Name a colour.", "max_output_tokens": 24},
        why="only completions and chats can be",
        cut=AT_BORDER,
    ),
    "a message": Case(
        INTERFACES,
        MESSAGES,
        {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 24},
        why="only completions and chats can be",
        cut=AT_BORDER,
    ),
    "an HTTP/1.0 client": Case(
        INTERFACES,
        COMPLETION,
        {"prompt": STORY, "max_tokens": 20},
        why="its client speaks HTTP/1.0",
        cut=AT_BORDER,
        is_http_1_0=True,
    ),
}
"""By name: the stream ends in an error that says why."""


# -- servers ------------------------------------------------------------------------------------

OURS, NATIVE, OTHER_SCHEDULER = "ours", "native", "other scheduler"
OWN, PLAIN, PARSING = "ours without parsers", "plain", "plain with parsers"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not thinks %}Sure.{% endif %}"
)
FLAGS = (
    *("--served-model-name", "model", "--dtype", "float32", "--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(2**28), "--enforce-eager"),
)
PARSER_FLAGS = (
    *("--tool-call-parser", "hermes", "--enable-auto-tool-choice"),
    *("--reasoning-parser", "first_sentence"),
    *("--reasoning-parser-plugin", str(Path(__file__).with_name("first_sentence.py"))),
)
SCALE_OUT = ("--enable-scale-out",)
KINDS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    OURS: ("smollm2-llava", PARSER_FLAGS, {}),
    NATIVE: ("smollm2", (), {"XLLM_PLATFORM": "native"}),
    OWN: ("smollm2-llava", (), {}),
    PLAIN: ("smollm2-llava", SCALE_OUT, {"XLLM_PLATFORM": "native"}),
    PARSING: ("smollm2", (*SCALE_OUT, *PARSER_FLAGS), {"XLLM_PLATFORM": "native"}),
    OTHER_SCHEDULER: (
        "smollm2",
        ("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"),
        {},
    ),
}
"""Model, flags and environment of each kind of server."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayedFleet]:
    """Two servers, each on a core of its own: both run at a time, and a sum depends on threads."""
    cores = sorted(os.sched_getaffinity(0))
    folder = tmp_path_factory.mktemp("fleet")
    template = folder / "template.jinja"
    template.write_text(CHAT_TEMPLATE)

    def make(kind: str, number: int) -> PeerServer:
        model, flags, environment = KINDS[kind]
        core = str(cores[number % len(cores)])
        return xllm_server(
            str(prepare(model)),
            f"{kind} {number}",
            "",
            flags=(*FLAGS, "--chat-template", str(template), *flags),
            environment={"VLLM_CPU_OMP_THREADS_BIND": core, **environment},
        )

    paths = (CHAT, COMPLETION, RESPONSES, MESSAGES, RESUME_PATH, GENERATE_PATH)
    with contextlib.ExitStack() as stack:
        yield RelayedFleet(make, paths, num_servers=2, folder=folder, stack=stack)


def body_of(case: Case) -> dict[str, Any]:
    return {"model": "model", "temperature": 0, "stream": True, **case.body}


def ask(fleet: RelayedFleet, case: Case, *cuts: Cut) -> list[Any]:
    """The events of a stream that is cut off there."""
    if case.is_http_1_0:
        return events_in(fleet.post_http_1_0(case.path, json.dumps(body_of(case)).encode(), *cuts))
    return events_in(fleet.post(case.path, body_of(case), *cuts))


def read(fleet: RelayedFleet, case: Case, on_piece: Callable[[], object]) -> list[Any]:
    """The events of a stream; `on_piece` is called as they come."""
    text = ""
    with httpx.stream(
        "POST", fleet.url + case.path, json=body_of(case), timeout=PATIENCE_S, trust_env=False
    ) as reply:
        for part in reply.iter_text():
            text += part
            on_piece()
    return events_in(text)


def score(fleet: RelayedFleet, said: Said) -> tuple[str, list[float]]:
    """Text of a prompt and its output, and how probable a server finds each token of that."""
    tokens = [*said.prompt_token_ids, *said.token_ids]
    body = {"model": "model", "prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 1}
    server = fleet.servers[0]
    assert server is not None
    with server.client(PATIENCE_S) as client:
        reply = client.post(COMPLETION, json=body)
    (choice,) = reply.raise_for_status().json()["choices"]
    probs = choice["logprobs"]["token_logprobs"][len(said.prompt_token_ids) : len(tokens)]
    return choice["text"], probs


# -- tests --------------------------------------------------------------------------------------


def table() -> dict[str, tuple[bool, bool]]:
    """Each line of README's table, and whether it says yes of this plugin, and of plain servers."""
    _, _, after = README.read_text(encoding="utf-8").partition(
        "| request | with this plugin | plain, `--enable-scale-out` |\n|---|---|---|\n"
    )
    rows = [row.strip("| ").split(" | ") for row in after.partition("\n\n")[0].split("\n")]
    assert {len(row) for row in rows} == {3}
    assert all(verdict.startswith(("yes", "no")) for row in rows for verdict in row[1:])
    return {line: (ours.startswith("yes"), plain.startswith("yes")) for line, ours, plain in rows}


def test_every_line_of_the_table_has_its_cases() -> None:
    """A line that nobody tests, and a case of a line that is not there, both turn this red."""
    continued = {case.line for case in (*EXACT.values(), *MAYBE.values())}
    ends = {case.line for case in REFUSED.values()} | {OTHERS}
    lines = table()
    assert continued | ends == lines.keys()
    assert {line for line, (by_ours, _) in lines.items() if by_ours} <= continued
    assert {line for line, (by_ours, _) in lines.items() if not by_ours} == ends
    assert all(by_ours for by_ours, by_plain in lines.values() if by_plain)
    refused = {PLAIN_REFUSED[name][0].line for name in PLAIN_REFUSED}
    no_plain = {line for line, (by_ours, by_plain) in lines.items() if by_ours > by_plain}
    assert no_plain == refused | {PARSERS}


def on_two_servers(test: Any) -> Any:
    for mark in (pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(2 * READY_TIMEOUT_S)):
        test = mark(test)
    return test


def cuts_of(num_events: int) -> list[tuple[Cut, ...]]:
    """After the first event; twice, the second time before the last token; before [DONE]."""
    middle, finish = Cut(max(1, num_events // 2)), Cut(what=b'"finish_reason":"', num_bytes=0)
    return [(Cut(),), (middle, finish), (Cut(what=b"data: [DONE]", num_bytes=0),)]


@on_two_servers
@pytest.mark.parametrize("name", EXACT)
def test_nobody_can_tell(fleet: RelayedFleet, name: str) -> None:
    case = EXACT[name]
    fleet.have(OURS, OURS)
    events = ask(fleet, case)
    wanted = say_together(events)
    check_usage(case, events)
    assert wanted.is_done
    assert all(getattr(wanted, field) for field in case.shows), wanted
    for cuts in cuts_of(len(events) - 1):
        num_resumes = fleet.num_resumes
        events = ask(fleet, case, *cuts)
        check_usage(case, events)
        assert not differences(wanted, say_together(events)), cuts
        assert fleet.num_resumes == num_resumes + len(cuts)


def check_usage(case: Case, events: list[Any]) -> None:
    """If each event is to say how many tokens came until then, it is right."""
    if case.body.get("stream_options") != RUNNING_USAGE["stream_options"]:
        return
    num_tokens = 0
    for event in events[:-1]:
        num_tokens += sum(len(one.get("token_ids") or ()) for one in event["choices"])
        assert event["usage"]["completion_tokens"] == num_tokens


@on_two_servers
@pytest.mark.parametrize("name", MAYBE)
def test_a_sample_goes_on_from_what_was_sent(fleet: RelayedFleet, name: str) -> None:
    """Its tokens are as probable after the prompt and those before them as it says they are."""
    fleet.have(OURS, OURS)
    check_sample(fleet, MAYBE[name])


def check_sample(fleet: RelayedFleet, case: Case) -> None:
    num_events = len(ask(fleet, case)) - 1
    for cuts in cuts_of(num_events):
        said = say_together(ask(fleet, case, *cuts))
        assert said.is_done
        assert len(said.ids) == len(said.created) == len(said.finishes) == 1
        assert len(said.token_ids) == said.usage["completion_tokens"]
        text, probs = score(fleet, said)
        assert said.text in text
        told = said.log_probs
        content = told.get("content") or ()
        assert is_same(told.get("token_logprobs") or [one["logprob"] for one in content], probs)


@on_two_servers
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_says_why(fleet: RelayedFleet, name: str) -> None:
    case = REFUSED[name]
    fleet.have(OURS, OURS)
    check_error(ask(fleet, case, case.cut), case.why)


def check_error(events: list[Any], why: str) -> None:
    *before, last = events
    assert before
    assert set(last) == {"error"}, last
    assert why in last["error"]["message"]


LONG = {"max_tokens": 120, "ignore_eos": True}
UNDER_WAY = 5
"""Pieces of a stream that have come."""
KILLED = (
    chat(GREEDY, "Tell me about the sea.", **LONG, **USAGE),
    completion(SEEDED, seed=5, temperature=1.0, logprobs=1, **LONG),
    completion(PENALTIES, frequency_penalty=0.5, repetition_penalty=1.1, **LONG, **IDS),
    chat(GRAMMARS, "Write.", structured_outputs={"regex": "[a-z ]{400,500}"}, **LONG),
)
KILLED_PLAIN = (
    chat(GREEDY, "Tell me about the sea.", **LONG, **USAGE),
    completion(COUNTS, logprobs=2, **LONG, **IDS),
    completion(STOPS, EMOJI, stream_interval=3, **LONG, **USAGE),
)


def check_kill(
    fleet: RelayedFleet,
    number: int,
    cases: Sequence[Case],
    summed: Callable[[list[Any]], Said],
) -> None:
    """Each case twice at once, a server killed meanwhile: each comes to what it would have."""
    wanted = [summed(ask(fleet, case)) for case in cases] * 2
    num_resumes = fleet.num_resumes
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(len(wanted)) as pool:
        streams = [pool.submit(read, fleet, case, begun.release) for case in (*cases, *cases)]
        for _ in range(UNDER_WAY * len(streams)):
            assert begun.acquire(timeout=PATIENCE_S)
        fleet.kill(number)
        found = [summed(stream.result()) for stream in streams]
    none = [{}] * (2 * len(cases))
    assert [differences(one, two) for one, two in zip(wanted, found, strict=True)] == none
    assert fleet.num_resumes > num_resumes


@on_two_servers
def test_kill_9(fleet: RelayedFleet) -> None:
    """Streams run at both servers when one of them dies; all become what they would have become."""
    fleet.have(OURS, OURS)
    check_kill(fleet, 1, KILLED, say_together)


@on_two_servers
@pytest.mark.parametrize(
    ("kind", "why"), [(NATIVE, "HTTP 404"), (OTHER_SCHEDULER, "--scheduler-cls")]
)
def test_who_cannot_go_on_is_named(fleet: RelayedFleet, kind: str, why: str) -> None:
    """The stream begins at the server that has this plugin; else that one would continue it."""
    fleet.have(OURS, kind)
    case = completion(OTHERS)
    for _ in range(4):
        ask(fleet, completion(OTHERS, max_tokens=1))  # another turn
        events = ask(fleet, case, Cut(2))
        if events[-1] != "[DONE]":
            break
    check_error(events, why)


# -- servers without this plugin ------------------------------------------------------------------

PLAIN_WHY = {
    SEEDED: "a stream with a seed",
    STRINGS: "a stream with stop strings",
    PENALTIES: "a stream with",
    GRAMMARS: "a stream with",
    MEDIA: "a stream with media in its prompt",
}
"""By line of the table: why a server without this plugin does not go on."""
PLAIN_REFUSED = {
    name: (case, PLAIN_WHY[case.line]) for name, case in EXACT.items() if case.line in PLAIN_WHY
}
PARSED = {name: case for name, case in EXACT.items() if case.line == PARSERS}
PLAIN_EXACT = {
    name: case for name, case in EXACT.items() if case.line not in PLAIN_WHY and name not in PARSED
}


def plain_sum(events: list[Any]) -> Said:
    """Without the only field that the routes of such servers do not tell."""
    return say_together(
        {key: value for key, value in event.items() if key != "system_fingerprint"}
        if isinstance(event, dict)
        else event
        for event in events
    )


@on_two_servers
@pytest.mark.parametrize("name", PLAIN_EXACT)
def test_nobody_can_tell_of_plain_servers_either(fleet: RelayedFleet, name: str) -> None:
    case = PLAIN_EXACT[name]
    fleet.have(PLAIN, PLAIN)
    assert {one["continues"] for one in fleet.instances()} == {"scale-out"}
    events = ask(fleet, case)
    wanted = plain_sum(events)
    assert wanted.is_done
    assert all(getattr(wanted, field) for field in case.shows), wanted
    for cuts in cuts_of(len(events) - 1):
        num_resumes = fleet.num_resumes
        events = ask(fleet, case, *cuts)
        check_usage(case, events)
        assert not differences(wanted, plain_sum(events)), cuts
        assert fleet.num_resumes == num_resumes + len(cuts)


@on_two_servers
@pytest.mark.parametrize("name", MAYBE)
def test_a_sample_goes_on_at_a_plain_server(fleet: RelayedFleet, name: str) -> None:
    fleet.have(PLAIN, PLAIN)
    check_sample(fleet, MAYBE[name])


@on_two_servers
@pytest.mark.parametrize("name", PLAIN_REFUSED)
def test_what_a_plain_server_cannot_continue_says_why(fleet: RelayedFleet, name: str) -> None:
    case, why = PLAIN_REFUSED[name]
    fleet.have(PLAIN, PLAIN)
    check_error(ask(fleet, case, EARLY), why)


@on_two_servers
def test_a_plain_server_goes_on_when_another_is_killed(fleet: RelayedFleet) -> None:
    """`kill -9` in mid-stream: what ran there becomes what it would have become."""
    fleet.have(OWN, PLAIN)
    assert [one["continues"] for one in fleet.instances()] == ["plugin", "scale-out"]
    check_kill(fleet, 0, KILLED_PLAIN, plain_sum)


@on_two_servers
@pytest.mark.parametrize("name", PARSED)
def test_a_plain_server_with_parsers_continues_no_chat(fleet: RelayedFleet, name: str) -> None:
    fleet.have(PARSING, PARSING)
    check_error(ask(fleet, PARSED[name], EARLY), "a stream with")


@on_two_servers
def test_a_plain_server_with_parsers_continues_completions(fleet: RelayedFleet) -> None:
    fleet.have(PARSING, PARSING)
    check_error(ask(fleet, chat(GREEDY, "Name a colour."), EARLY), "parser")
    assert say_together(ask(fleet, completion(GREEDY), EARLY)).is_done
