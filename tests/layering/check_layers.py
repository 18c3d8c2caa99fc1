#!/usr/bin/env python3
"""Checks that the folders of src/weft use each other only downwards, and only as their CMake targets declare.

The order is the ```layers block of docs/architecture.md: a folder may include those on earlier lines. The CMake targets
come from a file that tests/CMakeLists.txt writes at configure time, one target a line, five fields separated by '|':
  folder | target | kind (STATIC_LIBRARY, EXECUTABLE) | weft_ targets it links (;) | its sources (;)
Prints one line for each violation, and ends with 1 if there is any.
"""

import argparse
import pathlib
import re
import sys

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
SOURCE_SUFFIXES = {".h", ".hpp", ".cc", ".cpp", ".inc", ".cu", ".cuh"}
COMPILED_SUFFIXES = {".cc", ".cpp", ".cu"}


class Target:
    def __init__(self, folder, name, kind, deps, sources):
        self.folder = folder
        self.name = name
        self.is_library = kind.endswith("LIBRARY")
        self.is_folder = name == f"weft_{folder}"  # the library of its folder, not a helper of tests
        self.deps = deps  # names of targets
        self.sources = sources  # paths relative to src/weft


def read_layers(architecture):
    """Folder -> its line in the layers block."""
    blocks = re.findall(r"^```layers\n(.*?)^```", architecture, re.MULTILINE | re.DOTALL)
    if len(blocks) != 1:
        raise SystemExit(f"docs/architecture.md: want one ```layers block, found {len(blocks)}")
    level_of = {}
    for level, line in enumerate(blocks[0].split("\n")):
        for folder in line.split():
            if folder in level_of:
                raise SystemExit(f"docs/architecture.md: folder {folder} stands twice in the layers block")
            level_of[folder] = level
    return level_of


def read_targets(text):
    targets = []
    for line in text.splitlines():
        if not line.strip():
            continue
        folder, name, kind, deps, sources = line.split("|")
        targets.append(
            Target(folder, name, kind, [d for d in deps.split(";") if d], [s for s in sources.split(";") if s])
        )
    return targets


def includes(path):
    """(line, included path, in quotes) of every include of one file; comments are not includes."""
    text = path.read_text(encoding="utf-8")
    # Block comments keep their newlines, so that line numbers stay right.
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)
    for match in INCLUDE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match.group(2), match.group(1) == '"'


def closure(target, by_name):
    """Names of all targets that `target` links, directly or through others."""
    seen, todo = set(), list(target.deps)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            if name in by_name:
                todo += by_name[name].deps
    return seen


def check_includes(root, level_of, errors):
    """Checks every include against the order.

    Returns file -> {included folder: line of its first include}, and file -> files of src/weft that it includes.
    """
    used, headers_of = {}, {}
    for path in sorted((root / "src/weft").rglob("*")):
        if path.suffix not in SOURCE_SUFFIXES or not path.is_file():
            continue
        relative = path.relative_to(root / "src/weft")
        shown = path.relative_to(root)
        if len(relative.parts) < 2:
            errors.append(f"{shown}: a source file lies in a folder of src/weft, not beside the folders")
            continue
        folder = relative.parts[0]
        used[relative.as_posix()] = folders = {}
        if folder not in level_of:
            continue  # Said once for the folder, in check_folders.
        for line, included, quoted in includes(path):
            if quoted and ((path.parent / included).exists() or ".." in pathlib.PurePosixPath(included).parts):
                errors.append(f'{shown}:{line}: write "{included}" as "weft/FOLDER/..."')
                continue
            if not included.startswith("weft/"):
                continue
            parts = included.split("/")
            other = parts[1]
            if len(parts) < 3 or other not in level_of:
                errors.append(f"{shown}:{line}: {included} is in no folder of the layers list")
                continue
            folders.setdefault(other, line)
            headers_of.setdefault(relative.as_posix(), []).append(included.removeprefix("weft/"))
            if other != folder and level_of[other] >= level_of[folder]:
                errors.append(f"{shown}:{line}: {folder} must not include {included}: {other} is not below {folder}")
    return used, headers_of


def check_folders(root, level_of, targets, errors):
    on_disk = {p.name for p in (root / "src/weft").iterdir() if p.is_dir() and any(p.iterdir())}
    for folder in sorted(on_disk - set(level_of)):
        errors.append(f"src/weft/{folder}: not in the layers list of docs/architecture.md")
    for folder in sorted(set(level_of) - on_disk):
        errors.append(f"docs/architecture.md: the layers list names {folder}, which src/weft lacks")
    # The order in which CMake takes the folders has to be one that the list allows.
    order = list(dict.fromkeys(t.folder for t in targets))
    for before, after in zip(order, order[1:]):
        if level_of.get(before, 0) > level_of.get(after, 0):
            errors.append(f"CMakeLists.txt: takes {before} before {after}, against the layers list")


def is_header(file):
    return pathlib.PurePosixPath(file).suffix not in COMPILED_SUFFIXES


def own_files(sources, folder, headers_of):
    """The sources and the headers of `folder` that they include, directly or through each other."""
    seen, todo = set(), list(sources)
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [h for h in headers_of.get(file, ()) if h.split("/")[0] == folder]
    return seen


def check_targets(level_of, targets, used, headers_of, errors):
    by_name = {t.name: t for t in targets}
    files_of = {t.name: own_files(t.sources, t.folder, headers_of) for t in targets}
    compiled = {source for t in targets for source in t.sources}
    reached_files = set().union(*files_of.values())
    for target in targets:
        where = f"src/weft/{target.folder}/CMakeLists.txt: {target.name}"

        def folder_of(name):
            return by_name[name].folder if name in by_name else name.removeprefix("weft_")

        direct = {folder_of(d) for d in target.deps} & set(level_of)
        reached = {folder_of(d) for d in closure(target, by_name)}
        for folder in sorted(direct - {target.folder}):
            if target.is_library and level_of[folder] >= level_of.get(target.folder, 0):
                errors.append(f"{where} depends on {folder}, which is not below {target.folder}")
            elif not target.is_library and level_of[folder] > level_of.get(target.folder, 0):
                errors.append(f"{where} depends on {folder}, which is above {target.folder}")
        files = files_of[target.name]
        if target.is_folder:  # Headers that nothing in the folder includes are part of its interface.
            files = files | ({f for f in used if f.split("/")[0] == target.folder and is_header(f)} - reached_files)
        else:  # What the folder's library includes is that library's to declare.
            files = files - files_of.get(f"weft_{target.folder}", set())
        wanted = {}
        for file in sorted(files):
            for folder, line in used.get(file, {}).items():
                wanted.setdefault(folder, f"src/weft/{file}:{line}")
        # The library of a folder names each folder that it includes; programs and helpers of tests may rely on what
        # their libraries bring.
        for folder in sorted(set(wanted) - (direct if target.is_folder else reached) - {target.folder}):
            errors.append(f"{where} lacks the dependency {folder} that {wanted[folder]} includes")
        if target.is_folder:
            for folder in sorted(direct - set(wanted) - {target.folder}):
                errors.append(f"{where} declares the dependency {folder}, which nothing in it includes")
    for file in sorted(used):
        if not is_header(file) and file not in compiled:
            errors.append(f"src/weft/{file}: no CMake target compiles it")


def check(root, targets_text):
    """All violations, as lines of text."""
    root = pathlib.Path(root)
    errors = []
    level_of = read_layers((root / "docs/architecture.md").read_text(encoding="utf-8"))
    targets = read_targets(targets_text)
    check_folders(root, level_of, targets, errors)
    used, headers_of = check_includes(root, level_of, errors)
    check_targets(level_of, targets, used, headers_of, errors)
    return errors, len(used), len(targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="the repository")
    parser.add_argument("--targets", required=True, help="the file of CMake targets")
    args = parser.parse_args()
    errors, files, targets = check(args.root, pathlib.Path(args.targets).read_text(encoding="utf-8"))
    for error in errors:
        print(error)
    print(f"{files} files, {targets} targets, {len(errors)} violations")
    if files == 0 or targets == 0:
        print("nothing was checked")
        return 1
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
