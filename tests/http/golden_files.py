"""Reads the reference files of tests/data/models, without packages."""
import array
import json


def read_safetensors(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        body = f.read()
    out = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        raw = body[begin:end]
        if t["dtype"] == "BF16":  # the upper half of a float32
            wide = bytearray(2 * len(raw))
            wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
            out[name] = array.array("f", bytes(wide))
        else:
            out[name] = array.array({"F32": "f", "I64": "q"}[t["dtype"]], raw)
    return out
