"""Averages damaged files, in a separate process, since HDF5 could crash or hang.

    python tests/helpers/fuzz_worker.py FOLDER .keras 0 1000

Each seed damages one file of the kind in FOLDER and averages it with an intact one.
Prints how many averages were written and how many refused. Any other outcome,
or many seconds spent on one file, ends the process with the seed in its message.
"""

import json
import pathlib
import random
import sys
import time
import zipfile

import h5py
import numpy as np
from weight_samples import (
    CONFIG,
    TENSORS,
    WRITERS,
    write_hdf5,
    write_keras,
    write_safetensors,
)

from polyak_model.checkpoints import average_files
from polyak_model.errors import InputError
from polyak_model.weight_files.reader import open_weights

PATIENCE_SECONDS = 20
NUMBERS = [0, 1, 7, 8, 2**15, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 16, 2**64 - 1]
JSON_VALUES = [None, True, -1, 1e308, "", "../x.weights.h5", "\0", [], {}, [[[]]], "a" * 300]


def main(folder, kind, start, count):
    folder = pathlib.Path(folder)
    sources = write_sources(folder, kind)
    written = 0
    for seed in range(int(start), int(start) + int(count)):
        begin = time.monotonic()
        try:
            written += survives(folder, kind, sources, random.Random(f"{kind} {seed}"))
        except BaseException:
            print("seed", seed, file=sys.stderr)
            raise
        assert time.monotonic() - begin < PATIENCE_SECONDS, f"seed {seed} took too long"
    print(json.dumps({"written": written, "refused": int(count) - written}))


def write_sources(folder, kind):
    """Writes intact files of several layouts; returns the contents to damage."""
    if kind == ".weights.h5":
        with h5py.File(folder / "latest.h5", "w", libver="latest") as file:
            for name, array in TENSORS.items():
                if array.dtype.kind != "V":
                    file[name] = array
        large = {"vars/0": np.zeros(500, "float32")}
        write_hdf5(folder / "zipped.h5", large, compression="gzip", chunks=(64,), shuffle=True)
        write_hdf5(folder / "plain.h5")
        paths = [folder / name for name in ("plain.h5", "latest.h5", "zipped.h5")]
    elif kind == ".keras":
        assets = {"assets/layers/lookup/vocabulary.txt": b"a\nb"}
        paths = [write_keras(folder / "stored.zip", **assets)]
        paths += [write_keras(folder / "packed.zip", compression=zipfile.ZIP_DEFLATED)]
    elif kind == ".safetensors":
        paths = [write_safetensors(folder / "source.safetensors")]
    else:
        paths = [WRITERS[kind](folder / "source.weights.json")]
    return [path.read_bytes() for path in paths]


def survives(folder, kind, sources, random):
    """Averages an intact file and a damaged one; returns whether the average was written."""
    source = random.choice(sources)
    whole, damaged = folder / f"whole{kind}", folder / f"damaged{kind}"
    whole.write_bytes(source)
    if kind == ".weights.json":
        damage_shards(folder, damaged, source, random)
    elif kind == ".keras" and random.random() < 0.6:
        damage_members(damaged, source, random)
    else:
        damaged.write_bytes(damage(source, random))
    can_keep_kind = kind == ".safetensors" or (kind == ".keras" and random.random() < 0.5)
    ending = kind if can_keep_kind else ".weights.h5"
    output = folder / f"output{ending}"
    before = sorted(folder.iterdir())
    paths = [whole, damaged]
    random.shuffle(paths)
    refusal = None
    try:
        average_files(paths, output)
    except InputError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.isprintable(), repr(refusal)
        assert sorted(folder.iterdir()) == before, sorted(folder.iterdir())
        return False
    with open_weights(output) as weights:
        for variable in weights.variables.values():
            variable.read()
    output.unlink()
    return True


def damage_shards(folder, damaged, source, random):
    """Damages the map, or one of its shards."""
    if random.random() < 0.5:
        if random.random() < 0.5:
            damaged.write_bytes(damage(source, random))
        else:
            damaged.write_text(json.dumps(damage_json(json.loads(source), random)))
        return
    damaged.write_bytes(source.replace(b"source_", b"damaged_"))
    shards = sorted(folder.glob("source_*"))
    victim = random.choice(shards)
    for shard in shards:
        content = shard.read_bytes()
        copy = folder / shard.name.replace("source_", "damaged_")
        copy.write_bytes(damage(content, random) if shard == victim else content)


def damage_members(path, source, random):
    """Damages members of an archive, with valid checksums."""
    path.write_bytes(source)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    victim = random.choice([*members, "model.weights.h5"])
    if victim == "config.json" and random.random() < 0.7:
        members[victim] = json.dumps(damage_json(CONFIG, random)).encode()
    elif random.random() < 0.1:
        members[random.choice(["../a", "/a", "a\\b", "assets/../../a"])] = members.pop(victim)
    else:
        members[victim] = damage(members[victim], random)
    with zipfile.ZipFile(path, "w", random.choice([0, 8])) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def damage(content, random):
    """Flips bits, sets numbers, cuts, copies and removes pieces."""
    content = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        if not content:
            break
        place, length = random.randrange(len(content)), random.randrange(1, 65)
        other = random.randrange(len(content))
        way = random.random()
        if way < 0.5:
            content[place] ^= 1 << random.randrange(8)
        elif way < 0.7:
            size = random.choice([1, 2, 4, 8])
            number = random.choice(NUMBERS) % 2 ** (8 * size)
            content[place : place + size] = number.to_bytes(size, "little")
        elif way < 0.8:
            content[place : place + length] = content[other : other + length]
        elif way < 0.9:
            content[place : place + length] = b""
        else:
            del content[place:]
    return bytes(content)


def damage_json(value, random):
    """Replaces something somewhere in a JSON value."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        key = random.choice(list(value))
        return {**value, key: damage_json(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        return [*value[:place], damage_json(value[place], random), *value[place + 1 :]]
    return random.choice(JSON_VALUES)


if __name__ == "__main__":
    main(*sys.argv[1:])
