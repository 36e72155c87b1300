"""Files: save and load without ever executing code, and read published weights into models.py.

A payload is a nested dict / list of tensors, numbers, strings and None. A model's
payload is {"model": state_dict, "detector": name, "config": model.config, "classes": [...], "category_ids": [...]}
and whatever else the caller adds.
"""
import argparse
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# What published .pth files hold beside tensors, and what cannot execute anything when it is unpickled.
INERT = [argparse.Namespace]

# Source name -> ours, as regular expressions tried from the top; the first that matches the start of a name counts.
# {name of the format: (a key that only this format has, table)}
OFFICIAL_DINO = [
    (r"backbone\.0\.body\.", "backbone."),
    (r"input_proj\.", "encoder.project."),
    (r"transformer\.level_embed", "encoder.level_embed"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.attention."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.", r"encoder.layers.\1.norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.(linear1|linear2)\.", r"encoder.layers.\1.ffn.\2."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"encoder.layers.\1.ffn.norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.", r"decoder.layers.\1.self_attention."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.", r"decoder.layers.\1.self_norm."),      # official: self is norm2,
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.layers.\1.cross_attention."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.cross_norm."),     # cross is norm1
    (r"transformer\.decoder\.layers\.(\d+)\.(linear1|linear2)\.", r"decoder.layers.\1.ffn.\2."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"decoder.layers.\1.ffn.norm."),
    (r"transformer\.decoder\.norm\.", "decoder.norm."),
    (r"transformer\.decoder\.ref_point_head\.", "decoder.position."),
    (r"(transformer\.decoder\.)?bbox_embed\.\d+\.", "decoder.box_head."),              # one head, stored for each layer
    (r"(transformer\.decoder\.)?class_embed\.\d+\.", "decoder.class_head."),
    (r"transformer\.enc_output\.", "proposals.project."),
    (r"transformer\.enc_output_norm\.", "proposals.norm."),
    (r"transformer\.enc_out_bbox_embed\.", "proposals.box_head."),
    (r"transformer\.enc_out_class_embed\.", "proposals.class_head."),
    (r"transformer\.tgt_embed\.", "content."),
    (r"label_enc\.", "label_embed."),
]
FORMATS = {
    "ours": ("encoder.project.0.0.weight", []),
    "official_dino": ("transformer.enc_out_class_embed.weight", OFFICIAL_DINO),
}
PER_CLASS = re.compile(r"class_head\.|label_embed\.")        # re-initialised when the number of classes differs
PER_QUERY = re.compile(r"content\.")                         # by rank: the first rows are kept


def save(path: str | Path, payload: dict, half: bool = False) -> None:
    """Write atomically: a crash at any moment leaves the old file or the new one, never a broken one.

    A name ending in .safetensors holds payload["model"] alone as tensors and the rest, which must be plain values, as
    JSON in its metadata; half: floating-point weights as float16. Any other name: torch.save of the whole payload.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        if path.suffix == ".safetensors":
            weights = {key: (value.half() if half and value.is_floating_point() else value).contiguous()
                       for key, value in payload["model"].items()}
            rest = {key: value for key, value in payload.items() if key != "model"}
            save_file(weights, temporary, metadata={"payload": json.dumps(rest)})
        else:
            torch.save(payload, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)                           # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: str | Path, map_location="cpu") -> dict:
    """Read what `save` wrote, or any .pth / .safetensors file; float16 weights stay float16. Never executes code.

    Raises FileNotFoundError or ValueError with one line: a missing or cut-off file, a pickle that holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: check the path")
    broken = f"{path} is not a readable checkpoint: it is damaged or of another kind; copy or download it again"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt", device=str(map_location)) as file:
                rest = json.loads((file.metadata() or {}).get("payload", "{}"))
                return {"model": {key: file.get_tensor(key) for key in file.keys()}, **rest}
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{broken} ({error})") from None
    try:
        with torch.serialization.safe_globals(INERT):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:                               # torch raises many kinds for a damaged file
        text = " ".join(str(error).split())
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            raise ValueError(f"{path} holds a {found[1]}, which could execute code when loaded: refused; save tensors "
                             "where it was made, torch.save({'model': model.state_dict()}, FILE)") from None
        raise ValueError(f"{broken} ({text[:120]})") from None


@dataclass
class Report:
    """What `load_weights` did, by our names; skipped are names of the source."""
    source: str
    loaded: dict[str, str] = field(default_factory=dict)         # our name -> source name
    resized: dict[str, str] = field(default_factory=dict)        # our name -> what was done
    skipped: list[str] = field(default_factory=list)             # of parts that the model lacks
    missing: list[str] = field(default_factory=list)             # of the model, not in the source: left as they were

    def __str__(self):
        resized = "; ".join(f"{name} {change}" for name, change in self.resized.items()) or "none"
        return (f"{self.source}: loaded {len(self.loaded)} tensors, skipped {len(self.skipped)}, "
                f"missing {len(self.missing)}, resized: {resized}")


def load_weights(model: nn.Module, source_weights: str | Path | dict, source: str = "auto") -> Report:
    """Copy weights into the model, whichever known program made them, and print one line about it.

    source_weights: a file, a payload, or a state_dict. source: one of FORMATS, or "auto" to recognise it by its names.
    Class heads and label embeddings of another number of classes keep the model's own initialisation; of another number
    of queries the first ones are used. A part of the model (backbone, encoder, ...) is loaded whole or not at all.
    Raises ValueError when nothing fits, when a part fits only partly, or when any other shape differs.
    """
    payload = source_weights if isinstance(source_weights, dict) else load(source_weights)
    origin = "state_dict" if isinstance(source_weights, dict) else str(source_weights)
    state = next((payload[key] for key in ("model", "state_dict") if isinstance(payload.get(key), dict)), payload)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if source == "auto":
        source = next((name for name, (key, _) in FORMATS.items() if key in state), None)
    if source not in FORMATS:
        raise ValueError(f"{origin}: names of no known format ({', '.join(FORMATS)}): is it a detector's checkpoint?")
    detector = payload.get("detector", model.detector)
    if detector != model.detector:
        raise ValueError(f"{origin} holds a {detector}, the model is a {model.detector}: build that detector instead")

    report = Report(f"{origin} ({source})")
    own, first_rows = model.state_dict(), {}
    for key, value in state.items():
        name = rename(key, FORMATS[source][1])
        if name not in own:
            if not name.endswith("num_batches_tracked"):
                report.skipped.append(key)
        elif name in report.loaded:                          # a head that the source stores once per layer
            if not torch.equal(value, state[report.loaded[name]]):
                raise ValueError(f"{origin}: {key} differs from {report.loaded[name]}, this model has one for both")
        elif name in report.resized:
            continue
        elif value.shape == own[name].shape:
            report.loaded[name] = key
        elif value.shape[1:] == own[name].shape[1:] and PER_CLASS.search(name):
            report.resized[name] = f"({len(value)} to {len(own[name])} rows: re-initialised)"
        elif value.shape[1:] == own[name].shape[1:] and PER_QUERY.match(name):
            report.resized[name] = f"({len(value)} to {len(own[name])} rows: the first kept)"
            first_rows[name] = value[:len(own[name])]
        else:
            raise ValueError(f"{origin}: {key} is {tuple(value.shape)}, the model's {name} {tuple(own[name].shape)}: "
                             "another architecture; build the model with the checkpoint's sizes")
    # BatchNorm's counter of batches is not in files made with frozen BatchNorm, and nothing depends on it.
    report.missing = [name for name in own if name not in report.loaded and name not in report.resized
                      and not name.endswith("num_batches_tracked")]
    if not report.loaded:
        raise ValueError(f"{origin}: none of its {len(state)} tensors fits this model: is it another architecture's?")
    loaded_parts = {part(name) for name in report.loaded}
    stray = [key for key in report.skipped if part(rename(key, FORMATS[source][1])) in loaded_parts]
    stray += [name for name in report.missing if part(name) in loaded_parts]
    if stray:
        raise ValueError(f"{origin}: another architecture, {stray[0]} and {len(stray) - 1} more have no counterpart; "
                         "build the model with the checkpoint's depths and options")
    with torch.no_grad():
        for name, key in report.loaded.items():
            own[name].copy_(state[key])                      # state_dict() shares the model's memory
        for name, rows in first_rows.items():
            own[name][:len(rows)] = rows
    print(report)
    return report


def rename(key: str, table: list[tuple[str, str]]) -> str:
    """The name that `table` gives a source key; a key that no line matches keeps its own."""
    for pattern, ours in table:
        if re.match(pattern, key):
            return re.sub(pattern, ours, key, count=1)
    return key


def part(name: str) -> str:
    return name.split(".")[0]
