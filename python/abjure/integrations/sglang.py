"""Processors for SGLang: a custom logit processor whose contexts come from the live requests.

SGLang sends the class to the server as a string, by name where its module can be imported there, and makes an object of
it without arguments. Put the class into a module of yours that client and server both find::

    # my_guard.py
    from abjure import refuse
    from abjure.integrations import sglang

    Guard = sglang.processor("Guard", [refuse.ForbiddenPhrases([[5, 7, 9]])])

    # python -m sglang.launch_server ... --enable-custom-logit-processor --disable-overlap-schedule
    # request: {"custom_logit_processor": my_guard.Guard.to_str(), "sampling_params": {"custom_params": {}}}

A guard that clients send is a guard that clients can leave out: have the gateway add it. Written for SGLang 0.5.23.
"""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError, ShapeError
from ._requests import Profiles, Row, engine_class


def processor(name: str, profiles: Any, *, default: str | None = None, module: str | None = None) -> type:
    """A ``CustomLogitProcessor`` class; ``.to_str()`` of it is what requests carry.

    Each request needs ``custom_params`` (an empty dict will do), or SGLang does not show which request a row is. A
    row's profile is ``custom_params["abjure"]``, or the default. With speculative decoding SGLang shows drafted rows
    without the drafts, and with the overlap scheduler the last token is missing: both are refused, not guessed.

    Args:
        name: the name that the class is assigned to in its module.
        profiles: a list of processors, or names to lists (or to functions that make them).
        default: profile of requests that name none; None: the first.
        module: where the class will be found; None: the caller's.

    Raises:
        ImportError: SGLang is not there. ArgumentError, DTypeError: profiles or names that do not fit.
    """
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    members = {"profiles": Profiles(profiles, default), "__call__": _call, "__doc__": _call.__doc__}
    return engine_class(name, CustomLogitProcessor, members, module, depth=2)


def _call(self: Any, logits: Any, custom_param_list: Any = None) -> Any:
    """Writes into ``(rows, vocabulary)`` logits and returns them.

    Raises:
        ArgumentError: rows without their request, draft rows, the overlap scheduler, an unknown profile.
        ShapeError: not one dict of parameters per row. Others as the processors.
    """
    _expect_no_overlap()
    given = list(custom_param_list or [])
    if len(given) != logits.shape[0]:
        raise ShapeError(f"custom_param_list: expected one dict per row ({logits.shape[0]}), got {len(given)}")
    rows, seen = [], set()
    for i, parameters in enumerate(given):
        request = (parameters or {}).get("__req__")
        if request is None:
            raise ArgumentError(
                f"custom_params: expected a dict in each request, so that SGLang shows it; row {i} has none"
            )
        if id(parameters) in seen:
            raise ArgumentError(
                "custom_param_list: a request has several rows (speculative decoding), their drafts hidden"
            )
        seen.add(id(parameters))
        rows.append(Row(self.profiles.chosen(parameters), request.origin_input_ids, request.output_ids))
    return self.profiles.write_(logits, rows)


def _expect_no_overlap() -> None:
    """Where the server's settings can be seen: no overlap scheduler, under which a request lacks its last token."""
    try:
        from sglang.srt.runtime_context import get_schedule

        overlapped = get_schedule().disable_overlap_schedule is False
    except Exception:  # no server around, or another version of it
        return
    if overlapped:
        raise ArgumentError("server: expected --disable-overlap-schedule, under which requests show their last token")
