"""Programs of torch.export.save: a zip of JSON and of raw weights.

Version 0 of the archive (torch 2.8 and later) has each weight as bytes, and in JSON which is which,
with shapes and strides. What came before it has a file of torch.save inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from normwise.interop.checkpoints.archive import Archive
from normwise.interop.checkpoints.grouping import NormPlan, plans_of
from normwise.interop.checkpoints.limits import DESCRIPTION, parse_json, shown
from normwise.interop.checkpoints.pickle_file import read_torch_archive
from normwise.interop.checkpoints.tensors import DTYPES, Stored

__all__ = ["is_exported", "read_exported"]

FORMAT, VERSION = "archive_format", "archive_version"
KNOWN_VERSIONS = ("0",)
CONFIG = re.compile(r"data/(weights|constants)/(.+)_\1_config\.json")
OLD_GRAPH = "serialized_exported_program.json"
OLD_WEIGHTS = ("serialized_state_dict.pt", "serialized_state_dict.json")
# torch._export.serde.schema.ScalarType
TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32",
    8: "float64", 9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16",
    28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
NORM = re.compile(r"torch\.ops\.aten\.\w*batch_norm\w*\.\w+")


def is_exported(archive: Archive) -> bool:
    return FORMAT in archive or OLD_GRAPH in archive


def _at(value: Any, *path: str) -> Any:
    """What stands at this path of nested JSON, None where something else does."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _json(archive: Archive, name: str) -> dict[str, Any]:
    region = archive.region(name)
    if region.size > DESCRIPTION:
        archive.file.refuse(f"{shown(name)} of {region.size} bytes, more than it takes")
    try:
        return parse_json(region.read())
    except ValueError as error:
        archive.file.refuse(f"{shown(name)}, which cannot be read ({shown(str(error), 200)})")


def _sizes(values: Any) -> tuple[Any, ...]:
    """Of a list of ``{"as_int": 4}``; what is no number is refused by Stored.checked."""
    return tuple(_at(v, "as_int") for v in values) if isinstance(values, list) else (None,)


def _payloads(archive: Archive, config: str, folder: str) -> Iterator[tuple[str, Stored]]:
    entries = _json(archive, config).get("config")
    if not isinstance(entries, dict):
        archive.file.refuse(f"{shown(config)} without its list of tensors")
    for name, entry in entries.items():
        meta, path = _at(entry, "tensor_meta"), _at(entry, "path_name")
        if meta is None or _at(entry, "use_pickle") is not False:
            continue  # custom objects and subclasses of Tensor, for which code would have to run
        code = meta.get("dtype") if isinstance(meta, dict) else None
        dtype = DTYPES.get(TYPES.get(code, "")) if type(code) is int else None
        yield (
            name,
            Stored(
                _sizes(_at(meta, "sizes")),
                dtype,
                archive.region(f"{folder}/{shown(path) if not isinstance(path, str) else path}"),
                _sizes(_at(meta, "strides")),
                _at(meta, "storage_offset", "as_int"),
                archive.text("byteorder") or "little",
            ).checked(name),
        )


def _settings(archive: Archive, graph: str) -> dict[str, tuple[float | None, float | None]]:
    """(eps, momentum) of the batch norms of a graph, by the name of their running mean."""
    region = archive.region(graph)
    try:
        program = parse_json(region.read()) if region.size <= DESCRIPTION else {}
    except ValueError:
        return {}  # the weights can be read without it; a graph may be larger than what we parse
    buffers = {}
    specs = _at(program, "graph_module", "signature", "input_specs")
    for spec in specs if isinstance(specs, list) else ():
        argument, name = _at(spec, "buffer", "arg", "name"), _at(spec, "buffer", "buffer_name")
        if isinstance(argument, str) and isinstance(name, str):
            buffers[argument] = name
    settings = {}
    nodes = _at(program, "graph_module", "graph", "nodes")
    for node in nodes if isinstance(nodes, list) else ():
        target, inputs = _at(node, "target"), _at(node, "inputs")
        if not isinstance(target, str) or not NORM.fullmatch(target):
            continue
        given = (
            {_at(i, "name"): _at(i, "arg") for i in inputs if isinstance(_at(i, "name"), str)}
            if isinstance(inputs, list)
            else {}
        )
        mean = _at(given, "running_mean", "as_tensor", "name")
        numbers = [_at(given, key, "as_float") for key in ("eps", "momentum")]
        eps, momentum = (n if type(n) is float else None for n in numbers)
        if isinstance(mean, str) and mean in buffers:
            settings[buffers[mean]] = eps, momentum
    return settings


def _with_settings(
    plans: list[NormPlan], settings: Mapping[str, tuple[float | None, float | None]]
) -> list[NormPlan]:
    made = []
    for plan in plans:
        eps, momentum = settings.get(plan.tensors.get("running_mean", ""), (None, None))
        made.append(replace(plan, eps=eps, momentum=momentum))
    return made


def read_exported(archive: Archive) -> tuple[dict[str, Stored], list[NormPlan]]:
    """The tensors and norms of the program, or programs; their names then start with theirs."""
    file = archive.file
    if FORMAT not in archive:
        nested = next((name for name in OLD_WEIGHTS if name in archive), None)
        if nested is None:
            file.refuse("an exported program without weights")
        tensors = read_torch_archive(Archive(archive.region(nested)))
        return tensors, plans_of(tensors)
    form, version = archive.text(FORMAT), archive.text(VERSION)
    if form != "pt2" or version not in KNOWN_VERSIONS:
        file.refuse(
            f"an exported program of format {shown(form)}, version {shown(version)}, where "
            f"'pt2' in version {' or '.join(KNOWN_VERSIONS)} is known",
            "a later normwise, or torch.save(program.state_dict, path)",
        )
    configs = [match for name in archive.names("data/") if (match := CONFIG.fullmatch(name))]
    models = {match[2] for match in configs}
    if not any(match[1] == "weights" for match in configs):
        file.refuse("a package without weights of its own (compiled ahead of time, say)",
                    "the .pt2 file of torch.export.save")  # fmt: skip
    tensors, settings = {}, {}
    for match in configs:
        prefix = f"{match[2]}." if len(models) > 1 else ""
        for name, stored in _payloads(archive, match[0], f"data/{match[1]}"):
            tensors[prefix + name] = stored
        if (graph := f"models/{match[2]}.json") in archive:
            settings.update({prefix + n: s for n, s in _settings(archive, graph).items()})
    return tensors, _with_settings(plans_of(tensors), settings)
