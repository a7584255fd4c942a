"""Edits of checkpoints on disk: to a copy that appears complete or not at all, or in place with a journal."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, overload

from .. import _native
from ..errors import ArgumentError, CheckpointError
from .layout import depth_of
from .plan import Plan, as_recipe, digest, planned, shard_edits
from .stored import (
    EDITING,
    FORMAT,
    Shard,
    Stored,
    expect_writable_in_place,
    file_errors,
    is_patch,
    journal_of,
    kind_of,
    opened,
    parse_memory,
    partial_of,
    patch_name,
    provenance_path,
    read_json,
    sync_directory,
    write_synced,
)

Hashes = Literal["all", "edited"]
_STATE = "abjure.partial.1"


#: Numbers of the reports that a total can be given of.
_COUNTED = {"ablate": ("residual_before", "residual_after"), "dampen": ("selected", "changed", "zeroed")}


@dataclass
class EditReport:
    """What an edit did.

    Attributes:
        path: the edited checkpoint.
        tensors: name of an edited tensor to ``before``, ``after`` (SHA-256) and ``ops``, one report for each op: for an
            ablation ``rank``, ``residual_before``, ``residual_after`` (Frobenius norms of ``Q W``) and ``unrestored``;
            for a dampening ``selected``, ``changed`` and ``zeroed``.
        recipe_sha256: hash of what was done.
        patches: the files from which :func:`undo` restores the original, with their sizes in bytes.
        notes: what was left out or behind, and why.
        resumed: shards that an interrupted run had finished already.
    """

    path: Path
    tensors: dict[str, dict[str, Any]]
    recipe_sha256: str
    patches: dict[str, int]
    notes: list[str] = field(default_factory=list)
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types for JSON."""
        return {**vars(self), "path": str(self.path)}

    def __str__(self) -> str:
        size = sum(self.patches.values()) / 2**20
        lines = [f"{self.path}: {len(self.tensors)} tensors edited, undone by {size:.1f} MiB"]
        if self.resumed:
            lines.append(f"{self.resumed} shards were finished by an earlier run")
        for kind, keys in _COUNTED.items():
            mine = [op for t in self.tensors.values() for op in t["ops"] if op["op"] == kind]
            if kind == "ablate" and mine:
                before, after = (sum(op[k] ** 2 for op in mine) ** 0.5 for k in keys)
                lines.append(f"ablate: |QW| {before:.4g} -> {after:.4g}")
            elif mine:
                lines.append("dampen: " + ", ".join(f"{k} {sum(op[k] for op in mine):,}" for k in keys))
        return "\n".join([*lines, f"recipe {self.recipe_sha256[:12]}", *self.notes])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(json.dumps(t['ops']))}</td><td>{t['after'][:12]}</td></tr>"
            for name, t in self.tensors.items()
        )
        caption = html.escape(str(self).splitlines()[0])
        return f"<table><caption>{caption}</caption><tr><th>tensor</th><th>ops</th><th>SHA-256</th></tr>{rows}</table>"


@overload
def edit(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    ops: Any,
    *,
    memory: int | str = ...,
    dry_run: Literal[True],
    in_place: bool = ...,
    hashes: Hashes = ...,
    progress: bool = ...,
) -> Plan: ...


@overload
def edit(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    ops: Any,
    *,
    memory: int | str = ...,
    dry_run: Literal[False] = ...,
    in_place: bool = ...,
    hashes: Hashes = ...,
    progress: bool = ...,
) -> EditReport: ...


def edit(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    ops: Any,
    *,
    memory: int | str = "256M",
    dry_run: bool = False,
    in_place: bool = False,
    hashes: Hashes = "all",
    progress: bool = True,
) -> EditReport | Plan:
    """Edits a safetensors checkpoint without loading it; the original stays, or can be had back bit for bit.

    The tensors pass through memory in tiles, several at a time; the results are those of loading the model in torch
    and editing there with :func:`abjure.refuse.orthogonalize_` and :func:`abjure.forget.dampen_array_` (the same
    kernels, the same bits). The copy has its name only when it is complete: an interrupted run leaves nothing there
    but a hidden folder beside it, from which the same call goes on. Beside every edited shard a patch is written that
    :func:`undo` restores it from, and ``abjure.json`` holds SHA-256 of every tensor for :func:`verify`.

    Args:
        path: a Hugging Face directory (index and shards, or one file), or one ``.safetensors`` file.
        out: what to write, which must not exist yet; a file where ``path`` is one. None for ``in_place``.
        ops: one of :class:`Ablate`, :class:`Scale`, :class:`Dampen`, several, a :class:`Recipe`, or the path of one.
        memory: bytes of working memory, such as ``"256M"``.
        dry_run: return the :class:`Plan`; nothing is written.
        in_place: change ``path`` itself; old bytes are kept in a journal until the edit is complete.
        hashes: ``"all"``, or ``"edited"`` to hash only what is edited, so that the rest is copied within the system.
        progress: show a bar where standard error is a terminal.

    Returns:
        An :class:`EditReport`, or a :class:`Plan`.

    Raises:
        CheckpointError: the checkpoint is damaged, inconsistent or of another kind (pickles are refused, never
            loaded), a file cannot be read or written, or there is no space.
        ArgumentError, DTypeError, ShapeError: ops that do not fit the checkpoint; ``out`` exists or lies in ``path``.
        NonFiniteError, DegenerateError, ArgumentError: a direction, an importance or a weight is bad.

        The source is as it was then, and there is no ``out``.
    """
    budget = parse_memory(memory)
    if hashes not in ("all", "edited"):
        raise ArgumentError(f"hashes: expected 'all' or 'edited', got {hashes!r}")
    recipe = as_recipe(ops)
    root, alone = kind_of(path)
    target = _target(root, alone, out, in_place)
    if target is None and not dry_run:
        recover(root)
    with contextlib.ExitStack() as cleanup, file_errors(root):
        stored = opened(path)
        plan = planned(stored, target, recipe, cleanup)
        if target is not None:
            plan.notes += stored.carried()[1]
        if dry_run:
            return plan
        number = len((stored.provenance() or {"history": []})["history"]) + 1
        run = _Run(stored, budget, hashes, progress)
        if target is None:
            return _edit_in_place(run, plan, number)
        return _edit_copy(run, plan, target, number)


def _target(root: Path, alone: bool, out: str | os.PathLike[str] | None, in_place: bool) -> Path | None:
    if out is None:
        if not in_place:
            raise ArgumentError("out: expected a path, got None (in_place=True changes the checkpoint itself)")
        return None
    target = Path(out)
    if target.resolve() == root.resolve():
        if not in_place:
            raise ArgumentError("out: expected another path than the source (in_place=True changes the source itself)")
        return None
    if in_place:
        raise ArgumentError("in_place: expected no out path, or that of the source")
    if not alone and root.resolve() in target.resolve().parents:
        raise ArgumentError(f"out: expected a path outside of the source, got {str(target)!r}")
    if alone and target.suffix != ".safetensors":
        raise ArgumentError(f"out: expected a name ending in .safetensors as the source has, got {str(target)!r}")
    if target.is_symlink() or (target.exists() and (alone or not target.is_dir() or any(target.iterdir()))):
        raise ArgumentError(f"out: expected a path that does not exist, got {str(target)!r}")
    if not target.parent.is_dir():
        raise ArgumentError(f"out: expected a path in an existing folder, got {str(target)!r}")
    return target


@dataclass
class _Run:
    stored: Stored
    memory: int
    hashes: str
    progress: bool

    def jobs(self, jobs: list[Any], total: int, what: str) -> list[dict[str, Any]]:
        """Runs shard jobs; their records."""
        if not jobs:
            return []
        if not self.progress or not sys.stderr.isatty():
            found = _native.checkpoint_run(jobs, self.memory, self.hashes == "all", None)
            return [json.loads(record) for record in found]
        from tqdm.auto import tqdm  # slow to import

        with tqdm(total=total, desc=what, unit="B", unit_scale=True) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            found = _native.checkpoint_run(jobs, self.memory, self.hashes == "all", show)
        return [json.loads(record) for record in found]


# Provenance -------------------------------------------------------------------------------------------------------


def _entry(plan: Plan, number: int, records: Mapping[str, Any], restore: dict[str, str]) -> dict[str, Any]:
    """One edit, for the history."""
    edited = {n: r for record in records.values() for n, r in record["tensors"].items() if r.get("ops")}
    return {
        "number": number,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "abjure": _native.__version__,
        "source": plan.source.name,
        "recipe_sha256": plan.recipe.sha256(),
        "ops": json.loads(plan.recipe.canonical())["ops"],
        "keep": plan.keep,
        "patches": {s: patch_name(s, number) for s, record in records.items() if edited.keys() & record["tensors"]},
        "headers": {shard: records[shard]["old_header"] for shard in records},
        "restore": restore,
        "tensors": edited,
    }


def _provenance(
    history: list[Any], records: Mapping[str, Any], keep: Mapping[str, str], files: dict[str, str]
) -> dict[str, Any]:
    tensors = {n: r["after"] for record in records.values() for n, r in record["tensors"].items()}
    for record in records.values():
        tensors.update({keep[n]: r["before"] for n, r in record["tensors"].items() if n in keep})
    return {
        "format": FORMAT,
        "history": history,
        "shards": {shard: {"header": r["header"], "bytes": r["bytes"]} for shard, r in records.items()},
        "tensors": tensors,
        "files": files,
    }


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _report(run: _Run, path: Path, entry: dict[str, Any], notes: list[str], resumed: int) -> EditReport:
    folder = path.parent if run.stored.alone else path
    patches = {p: (folder / p).stat().st_size for p in entry["patches"].values()}
    return EditReport(path, entry["tensors"], entry["recipe_sha256"], patches, notes, resumed)


# A copy -----------------------------------------------------------------------------------------------------------


def _edit_copy(run: _Run, plan: Plan, out: Path, number: int) -> EditReport:
    stored = run.stored
    texts, restore = _changed_texts(plan, stored)

    def job(shard: Shard, tree: Path, name: str, record: Path) -> Any:
        edits, keep = shard_edits(plan, shard)
        patch = str(tree / patch_name(name, number)) if edits else None
        return _native.ShardJob(
            str(shard.path), dest=str(tree / name), patch=patch, edits=edits, keep=keep, record=str(record)
        )

    entry: dict[str, Any] = {}

    def provenance(records: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
        entry.update(_entry(plan, number, records, restore))
        history = [*(stored.provenance() or {"history": []})["history"], entry]
        return _provenance(history, records, plan.keep, files)

    extra = sum(s.tensors[n].end - s.tensors[n].begin for s in stored.shards for n in plan.keep if n in s.tensors)
    resumed = _copy(run, out, digest(plan, stored, run.hashes), job, texts, provenance, extra, "editing")
    return _report(run, out, entry, plan.notes, resumed)


def _copy(
    run: _Run,
    out: Path,
    key: str,
    job: Callable[[Shard, Path, str, Path], Any],
    texts: Mapping[str, bytes],
    provenance: Callable[[dict[str, Any], dict[str, str]], dict[str, Any] | None],
    extra: int,
    what: str,
    leave: frozenset[str] = frozenset(),
) -> int:
    """Writes a whole checkpoint beside ``out`` and gives it that name; how many shards were there already."""
    stored, partial = run.stored, partial_of(out)
    names = {s.name: (out.name if stored.alone else s.name) for s in stored.shards}
    before = [s.identity() for s in stored.shards]
    with _locked(partial, key):
        tree, records = partial / "tree", partial / "records"
        done: dict[str, dict[str, Any]] = {}
        try:
            tree.mkdir(exist_ok=True)
            records.mkdir(exist_ok=True)
            for shard in stored.shards:
                record, target = records / f"{shard.name}.json", tree / names[shard.name]
                if record.is_file() and target.is_file():
                    found = read_json(record)
                    if found.get("bytes") == target.stat().st_size:
                        done[shard.name] = found
            resumed = len(done)
            todo = [s for s in stored.shards if s.name not in done]
            carried = stored.carried()[0]
            _expect_space(out, sum(s.size for s in todo) + extra, stored, carried)
            jobs = [job(s, tree, names[s.name], records / f"{s.name}.json") for s in todo]
            found_records = run.jobs(jobs, sum(s.size for s in todo), what)
            done.update({s.name: r for s, r in zip(todo, found_records, strict=True)})
            if [s.identity() for s in stored.shards] != before:
                raise CheckpointError(f"{stored.path}: was changed by somebody else while it was read")
            for shard in stored.shards:
                done[shard.name]["old_header"] = shard.header
            ordered = {names[s.name]: done[s.name] for s in stored.shards}
            files = _carry(stored, tree, names, [c for c in carried if c not in leave], texts)
            written = provenance(ordered, files)
            if written is not None:
                write_synced(tree / provenance_path(out, stored.alone).name, _dump(written))
            _settle(stored, tree, out)
        except BaseException as err:
            _clean(partial, keep=isinstance(err, (CheckpointError, OSError, KeyboardInterrupt)))
            raise
        shutil.rmtree(partial, ignore_errors=True)
    return resumed


@contextlib.contextmanager
def _locked(partial: Path, key: str) -> Iterator[None]:
    """The folder a copy grows in, ours alone; what an unlike run left in it is removed."""
    try:
        partial.mkdir(exist_ok=True)
        lock = open(partial / "lock", "a+b")  # noqa: SIM115
    except OSError as err:
        raise CheckpointError(f"{partial.parent}: cannot be written ({err.strerror})") from err
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as err:
            raise CheckpointError(f"{partial}: another run is writing here") from err
        state = partial / "state.json"
        known = read_json(state) if state.is_file() else {}
        if known.get("key") != key:
            for leftover in [p for p in partial.iterdir() if p.name != "lock"]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            write_synced(state, _dump({"format": _STATE, "key": key}))
        yield


def _clean(partial: Path, keep: bool) -> None:
    """After a failure: finished shards stay for the next run where that may end better; pieces go."""
    records = partial / "records"
    if keep and records.is_dir() and any(records.iterdir()):
        for part in [*partial.rglob("*.part")]:
            with contextlib.suppress(OSError):
                part.unlink()
        return
    shutil.rmtree(partial, ignore_errors=True)


def _expect_space(out: Path, shards: int, stored: Stored, carried: list[str]) -> None:
    need = shards + sum((stored.directory / c).stat().st_size for c in carried)
    free = shutil.disk_usage(out.parent).free
    if need > free:
        raise CheckpointError(f"{out.parent}: no space: {need} bytes are needed, {free} are free")


def _carry(
    stored: Stored, tree: Path, names: Mapping[str, str], carried: list[str], texts: Mapping[str, bytes]
) -> dict[str, str]:
    """Copies the files that are no shards, the index last; relative name to SHA-256."""
    hashes = {}
    if stored.alone:
        ((old, new),) = names.items()
        for name in carried:
            _copy_file(stored.directory / name, tree / (new + name.removeprefix(old)))
        return {}
    for name in [*carried, *([stored.index] if stored.index else [])]:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            write_synced(target, texts[name])
        else:
            _copy_file(stored.directory / name, target)
        if not is_patch(name):  # a patch brings its own
            hashes[name] = _native.sha256_file(str(target))
    return hashes


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "r+b") as file:
        os.fsync(file.fileno())


def _settle(stored: Stored, tree: Path, out: Path) -> None:
    """The step that makes the copy exist."""
    for folder in {p.parent for p in tree.rglob("*")} | {tree}:
        sync_directory(folder)
    if stored.alone:
        for path in sorted(tree.iterdir(), key=lambda p: p.name == out.name):  # the weights last
            os.replace(path, out.parent / path.name)
    else:
        if out.is_dir():
            out.rmdir()
        os.rename(tree, out)
    sync_directory(out.parent)


def _changed_texts(plan: Plan, stored: Stored) -> tuple[dict[str, bytes], dict[str, str]]:
    """New content of files that the edit changes, and their old text."""
    texts, restore = {}, {}
    if plan.config and not stored.alone:
        path = stored.directory / "config.json"
        config = read_json(path)
        for key, value in plan.config.items():
            inner = config
            *parents, last = key.split(".")
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        texts["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        restore["config.json"] = path.read_text(encoding="utf-8")
    if plan.keep and stored.index is not None:
        path = stored.directory / stored.index
        index = read_json(path)
        for old, new in plan.keep.items():
            shard = stored.shard_of(old)
            index["weight_map"][new] = shard.name
            if isinstance(index.get("metadata"), dict) and isinstance(index["metadata"].get("total_size"), int):
                index["metadata"]["total_size"] += shard.tensors[old].end - shard.tensors[old].begin
        texts[stored.index] = (json.dumps(index, indent=2) + "\n").encode()
        restore[stored.index] = path.read_text(encoding="utf-8")
    return texts, restore


# In place ---------------------------------------------------------------------------------------------------------


def _edit_in_place(run: _Run, plan: Plan, number: int) -> EditReport:
    stored = run.stored
    texts, restore = _changed_texts(plan, stored)
    touched = {s.name: set(shard_edits(plan, s)[0]) for s in stored.shards if shard_edits(plan, s)[0]}
    entry: dict[str, Any] = {}

    def job(shard: Shard, source: str, patch: str) -> Any:
        return _native.ShardJob(source, in_place=True, patch=patch, edits=shard_edits(plan, shard)[0])

    def provenance(records: dict[str, Any]) -> dict[str, Any]:
        entry.update(_entry(plan, number, records, restore))
        known = stored.provenance()
        history = [*(known or {"history": []})["history"], entry]
        return _provenance(history, records, {}, _file_hashes(stored, texts))

    _in_place(run, touched, job, number, texts, provenance, "editing")
    return _report(run, stored.path, entry, plan.notes, 0)


def _file_hashes(stored: Stored, texts: Mapping[str, bytes]) -> dict[str, str]:
    if stored.alone:
        return {}
    names = [n for n in stored.carried()[0] if not is_patch(n)] + ([stored.index] if stored.index else [])
    return {
        n: hashlib.sha256(texts[n]).hexdigest() if n in texts else _native.sha256_file(str(stored.directory / n))
        for n in names
    }


def _in_place(
    run: _Run,
    touched: Mapping[str, set[str]],
    job: Callable[[Shard, str, str], Any],
    number: int,
    texts: Mapping[str, bytes],
    provenance: Callable[[dict[str, Any]], dict[str, Any] | None],
    what: str,
    remove: tuple[str, ...] = (),
) -> None:
    """Changes shards where they are. While it goes on they have another name, so nothing loads them half-changed; old
    bytes, and at the end the decision to keep the new ones, are in the journal."""
    stored = run.stored
    expect_writable_in_place(stored)
    journal = journal_of(stored.path, stored.alone)
    shards = [s for s in stored.shards if s.name in touched]
    others = [s for s in stored.shards if s.name not in touched]
    need = sum(p.end - p.begin for s in shards for n, p in s.tensors.items() if n in touched[s.name])
    if need > (free := shutil.disk_usage(stored.directory).free):
        raise CheckpointError(f"{stored.directory}: no space for the journal: {need} bytes are needed, {free} are free")
    for shard in shards:
        if not os.access(shard.path, os.W_OK):
            raise CheckpointError(f"{shard.path}: cannot be written")
    journal.mkdir()
    try:
        for shard in shards:
            ranges = [(p.begin, p.end - p.begin) for n, p in shard.tensors.items() if n in touched[shard.name]]
            _native.journal_save(str(shard.path), ranges, str(journal / f"{shard.name}.old"))
        state: dict[str, Any] = {"format": _STATE, "phase": "armed", "shards": [s.name for s in shards]}
        write_synced(journal / "state.json", _dump(state))
        sync_directory(journal)
        sync_directory(stored.directory)
        for shard in shards:
            os.rename(shard.path, shard.path.with_name(shard.name + EDITING))
        sync_directory(stored.directory)
        # What is not touched is hashed first, so that the provenance is complete.
        quiet = run.jobs([_native.ShardJob(str(s.path)) for s in others], sum(s.size for s in others), "hashing")
        jobs = [
            job(s, str(s.path.with_name(s.name + EDITING)), str(journal / patch_name(s.name, number))) for s in shards
        ]
        found = run.jobs(jobs, sum(s.size for s in shards), what)
        by_name = {s.name: r for s, r in zip([*others, *shards], [*quiet, *found], strict=True)}
        for shard in stored.shards:
            by_name[shard.name]["old_header"] = shard.header
        written = provenance({s.name: by_name[s.name] for s in stored.shards})
        for name, text in texts.items():
            write_synced(journal / f"text.{name}", text)
        if written is not None:
            write_synced(journal / "provenance.json", _dump(written))
        state |= {"phase": "done", "texts": list(texts), "remove": list(remove), "provenance": written is not None}
        state["patches"] = [p for p in (patch_name(s.name, number) for s in shards) if (journal / p).exists()]
        write_synced(journal / "state.json", _dump(state))
        sync_directory(journal)
    except BaseException:
        recover(stored.path)
        raise
    recover(stored.path)


def recover(path: str | os.PathLike[str]) -> str | None:
    """Ends an edit in place that was interrupted: backward, to the bytes before it, or forward if it was complete.

    Returns:
        ``"back"``, ``"forward"``, or None where there was nothing to end.

    Raises:
        CheckpointError: the journal is damaged, or a file cannot be written.
    """
    root, alone = kind_of(path)
    journal = journal_of(root, alone)
    if not journal.is_dir():
        return None
    folder = root.parent if alone else root
    with file_errors(journal):
        state = read_json(journal / "state.json") if (journal / "state.json").is_file() else None
        if state is None:  # nothing had been touched yet
            shutil.rmtree(journal)
            return "back"
        names = [str(n) for n in state["shards"]]
        for name in [*names, *state.get("patches", ()), *state.get("texts", ()), *state.get("remove", ())]:
            if Path(name).name != name:
                raise CheckpointError(f"{journal}: expected plain file names, got {name!r}")
        here = {n: (folder / (n + EDITING) if (folder / (n + EDITING)).exists() else folder / n) for n in names}
        forward = state.get("phase") == "done"
        if forward:
            for patch in state["patches"]:
                if (journal / patch).exists():
                    os.replace(journal / patch, folder / patch)
            for text in state["texts"]:
                if (journal / f"text.{text}").exists():
                    os.replace(journal / f"text.{text}", folder / text)
            if (journal / "provenance.json").exists():
                os.replace(journal / "provenance.json", provenance_path(root, alone))
            if not state["provenance"]:
                provenance_path(root, alone).unlink(missing_ok=True)
            for name in state["remove"]:
                (folder / name).unlink(missing_ok=True)
        else:
            for name in names:
                _native.journal_rollback(str(journal / f"{name}.old"), str(here[name]))
        for name, path in here.items():
            if path.name != name:
                os.rename(path, folder / name)
        sync_directory(folder)
        shutil.rmtree(journal)
    return "forward" if forward else "back"


# Undo and verify --------------------------------------------------------------------------------------------------


def undo(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    memory: int | str = "256M",
    progress: bool = True,
) -> Path:
    """Restores a checkpoint to the bits it had before its last edit.

    Args:
        path: an edited checkpoint, with ``abjure.json`` and its patches; or one whose edit in place was interrupted,
            which is brought back (or, if it was complete, undone).
        out: write the restored checkpoint there, and leave ``path`` as it is; None restores in place, with a journal.
        memory: as :func:`edit`.
        progress: as :func:`edit`.

    Returns:
        The path of the restored checkpoint.

    Raises:
        CheckpointError: there is nothing to undo, an edited tensor was changed since (the first one is named), a patch
            is damaged, or a file cannot be read or written. ``path`` is as it was then.
        ArgumentError: ``out`` exists; the edit added tensors, which only a copy can take away.
    """
    budget = parse_memory(memory)
    root, alone = kind_of(path)
    target = _target(root, alone, out, in_place=out is None)
    if recover(root) == "back":
        if target is None:
            return root
        raise CheckpointError(f"{root}: an interrupted edit was brought back; there is nothing else to undo")
    with file_errors(root):
        stored = opened(path)
        known = stored.provenance()
        if known is None or not known["history"]:
            raise CheckpointError(f"{root}: there is no edit to undo (no {stored.provenance_path.name})")
        run = _Run(stored, budget, "all", progress)
        return _undo(run, known, target)


def _undo(run: _Run, known: dict[str, Any], target: Path | None) -> Path:
    stored, entry = run.stored, known["history"][-1]
    history, patches = known["history"][:-1], dict(entry["patches"])
    if stored.alone:  # the file may have been renamed since, with what lies beside it
        patches = {stored.path.name: stored.shards[0].patch(entry["number"])} if patches else {}
    for patch in patches.values():
        if not (stored.directory / patch).is_file():
            raise CheckpointError(f"{stored.directory / patch}: the patch is missing, so the edit cannot be undone")
    texts = {name: text.encode() for name, text in entry["restore"].items()}
    touched = {shard: set(_native.patch_tensors(str(stored.directory / patch))) for shard, patch in patches.items()}
    # What the patches are applied to has to be what they were made from.
    checked = [s for s in stored.shards if s.name in patches]
    records = run.jobs([_native.ShardJob(str(s.path)) for s in checked], sum(s.size for s in checked), "checking")
    for shard, record in zip(checked, records, strict=True):
        for name in touched[shard.name]:
            expected = entry["tensors"].get(name, {}).get("after")
            if record["tensors"].get(name, {}).get("after") != expected:
                raise CheckpointError(f"{shard.path}: {name}: was changed since the edit, so it cannot be undone")

    def restored(records: Mapping[str, Any]) -> None:
        for record in records.values():
            for name, r in record["tensors"].items():
                if r.get("ops") and r["after"] != entry["tensors"][name]["before"]:
                    raise CheckpointError(f"{stored.path}: {name}: the patch does not give the old bits (damaged?)")

    def provenance(records: dict[str, Any], files: dict[str, str]) -> dict[str, Any] | None:
        restored(records)
        return _provenance(history, records, {}, files) if history else None

    if target is not None:

        def job(shard: Shard, tree: Path, name: str, record: Path) -> Any:
            patch = patches.get(shard.name)
            back = None if patch is None else str(stored.directory / patch)
            return _native.ShardJob(str(shard.path), dest=str(tree / name), undo=back, record=str(record))

        identity = json.dumps(["undo", entry["number"], [s.identity() for s in stored.shards]])
        key = hashlib.sha256(identity.encode()).hexdigest()
        _copy(run, target, key, job, texts, provenance, 0, "restoring", frozenset(patches.values()))
        return target
    if entry["keep"]:
        raise ArgumentError("out: expected a path, since the edit added tensors, which only a copy can take away")

    def in_place(shard: Shard, source: str, patch: str) -> Any:
        return _native.ShardJob(source, in_place=True, undo=str(stored.directory / patches[shard.name]))

    def after(records: dict[str, Any]) -> dict[str, Any] | None:
        return provenance(records, _file_hashes(stored, texts))

    _in_place(run, touched, in_place, entry["number"], texts, after, "restoring", tuple(patches.values()))
    return stored.path


@dataclass
class VerifyReport:
    """Whether a checkpoint is what abjure wrote.

    Attributes:
        path: the checkpoint.
        changed: tensors, headers and files whose SHA-256 is another one.
        missing: what is no longer there.
        added: tensors that are new.
        tensors: how many were compared.
        edits: how many edits its history has.
    """

    path: Path
    changed: list[str]
    missing: list[str]
    added: list[str]
    tensors: int
    edits: int

    @property
    def ok(self) -> bool:
        return not (self.changed or self.missing or self.added)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types for JSON."""
        return {**vars(self), "path": str(self.path), "ok": self.ok}

    def __str__(self) -> str:
        head = (
            f"{self.path}: {'as written' if self.ok else 'NOT as written'}: {self.tensors} tensors, {self.edits} edits"
        )
        lines = [f"{kind}: {name}" for kind in ("changed", "missing", "added") for name in getattr(self, kind)]
        return "\n".join([head, *lines])


def verify(path: str | os.PathLike[str], *, memory: int | str = "256M", progress: bool = True) -> VerifyReport:
    """Compares every tensor, header and carried file with the SHA-256 that ``abjure.json`` holds.

    Raises:
        CheckpointError: there is no ``abjure.json``, or the checkpoint cannot be read.
    """
    budget = parse_memory(memory)
    with file_errors(Path(path)):
        stored = opened(path)
        known = stored.provenance()
        if known is None:
            raise CheckpointError(f"{stored.provenance_path}: expected what an edit wrote, found nothing")
        run = _Run(stored, budget, "all", progress)
        records = run.jobs([_native.ShardJob(str(s.path)) for s in stored.shards], stored.size, "verifying")
        found = {n: r["after"] for record in records for n, r in record["tensors"].items()}
        expected = known["tensors"]
        changed = [n for n, h in expected.items() if n in found and h is not None and found[n] != h]
        missing = [n for n in expected if n not in found]
        added = [n for n in found if n not in expected]
        shards = list(known["shards"].values()) if stored.alone else None
        for k, shard in enumerate(stored.shards):
            written = shards[k] if shards else known["shards"].get(shard.name)
            if written is None or written["header"] != shard.header:
                changed.append(f"{shard.name} (header)")
        for name, digest_ in known["files"].items():
            file = stored.directory / name
            if not file.is_file():
                missing.append(name)
            elif _native.sha256_file(str(file)) != digest_:
                changed.append(name)
    compared = sum(h is not None for h in expected.values())
    return VerifyReport(stored.path, changed, missing, added, compared, len(known["history"]))


@dataclass
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        path: the checkpoint.
        family: ``model_type`` of its config; empty if there is none.
        layers: blocks of the decoder as the config says; 0 if it does not.
        shards: files.
        tensors: how many there are.
        bytes: in all shards.
        dtypes: dtype as safetensors spells it to (tensors, elements).
        history: the edits that abjure made, oldest first: number, date, recipe hash, ops, number of tensors.
        interrupted: an edit in place was not ended.
    """

    path: Path
    family: str
    shards: int
    tensors: int
    bytes: int
    dtypes: dict[str, tuple[int, int]]
    history: list[dict[str, Any]]
    interrupted: bool = False
    layers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types for JSON."""
        return {**vars(self), "path": str(self.path)}

    def __str__(self) -> str:
        if self.interrupted:
            return f"{self.path}: an edit in place was interrupted; `abjure undo` brings it back"
        size = f"{self.bytes / 2**30:.2f} GiB"
        family = f"{self.family or 'no config'}, " + (f"{self.layers} layers, " if self.layers else "")
        lines = [f"{self.path}: {family}{self.tensors} tensors, {size}, {self.shards} shards"]
        lines += [f"{dtype}: {n} tensors, {count:,} elements" for dtype, (n, count) in self.dtypes.items()]
        for e in self.history:
            ops = ", ".join(str(op.get("kind", "?")) for op in e["ops"])
            what = f"{ops} on {e['tensors']} tensors, recipe {e['recipe'][:12]}"
            lines.append(f"edit {e['number']} of {e['date']}: {what}")
        return "\n".join(lines)


def info(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint holds and what was done to it; every header is checked, no data are read.

    Raises:
        CheckpointError: it is damaged, inconsistent or of another kind.
    """
    root, alone = kind_of(path)
    if journal_of(root, alone).exists():
        return CheckpointInfo(root, "", 0, 0, 0, {}, [], interrupted=True)
    with file_errors(root):
        stored = opened(path)
        dtypes: dict[str, tuple[int, int]] = {}
        for found in stored.tensors.values():
            count = 1
            for d in found.shape:
                count *= d
            n, total = dtypes.get(found.dtype, (0, 0))
            dtypes[found.dtype] = (n + 1, total + count)
        history = [
            {
                "number": e["number"],
                "date": e["date"],
                "recipe": e["recipe_sha256"],
                "ops": e["ops"],
                "tensors": len(e["tensors"]),
            }
            for e in (stored.provenance() or {"history": []})["history"]
        ]
    family = str(stored.config.get("model_type", ""))
    layers = depth_of(stored.config)
    counts = (len(stored.shards), len(stored.tensors), stored.size)
    return CheckpointInfo(root, family, *counts, dtypes, history, layers=layers)
