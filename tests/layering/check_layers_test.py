#!/usr/bin/env python3
"""Checks check_layers.py: a sound tree passes, and each single fault put into it is reported, alone."""

import pathlib
import tempfile
import unittest

import check_layers

ARCHITECTURE = """# Architecture
```
other/  a block that is not the list
```
```layers
core
api text
runner
cli
```
"""

SOUND = {
    "core/error.h": "#pragma once\n#include <string>\n",
    "core/error.cc": '#include "weft/core/error.h"\n',
    "api/request.h": '#pragma once\n#include "weft/core/error.h"\n',
    "api/request.cc": '#include "weft/api/request.h"\n',
    "text/tokenizer.cc": '#include "weft/core/error.h"\n#include "weft_text.h"\n',
    "runner/runner.h": '#pragma once\n#include "weft/api/request.h"\n// #include "weft/cli/main.h"\n',
    "runner/runner.cc": '#include "weft/runner/runner.h"\n/*\n#include "weft/cli/main.h"\n*/\n',
    "runner/runner_test.cc": '#include "weft/runner/runner.h"\n#include "weft/core/error.h"\n',
    "cli/main.cc": '#include "weft/runner/runner.h"\n#include "weft/cli/flags.h"\n',
    "cli/flags.h": "#pragma once\n",
}

TARGETS = """core|weft_core|STATIC_LIBRARY||core/error.cc
api|weft_api|STATIC_LIBRARY|weft_core|api/request.cc
text|weft_text|STATIC_LIBRARY|weft_core|text/tokenizer.cc
runner|weft_runner|STATIC_LIBRARY|weft_api|runner/runner.cc
runner|runner_test|EXECUTABLE|weft_runner|runner/runner_test.cc
cli|weft|EXECUTABLE|weft_runner|cli/main.cc
"""


def relinked(name, deps):
    """TARGETS with other dependencies of one target."""
    lines = [line.split("|") for line in TARGETS.splitlines()]
    return "\n".join("|".join(f[:3] + [deps] + f[4:] if f[1] == name else f) for f in lines)


class CheckLayers(unittest.TestCase):
    def errors(self, changed=None, targets=TARGETS, architecture=ARCHITECTURE):
        """The violations in the sound tree with `changed` files (path -> added text, or None to leave it out)."""
        files = dict(SOUND)
        for path, text in (changed or {}).items():
            if text is None:
                del files[path]
            else:
                files[path] = files.get(path, "") + text
        with tempfile.TemporaryDirectory() as directory:
            root = pathlib.Path(directory)
            for path, text in files.items():
                file = root / "src/weft" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            (root / "docs").mkdir()
            (root / "docs/architecture.md").write_text(architecture)
            return check_layers.check(root, targets)[0]

    def assert_one(self, errors, *parts):
        self.assertEqual(len(errors), 1, errors)
        for part in parts:
            self.assertIn(part, errors[0])

    def test_sound_tree_passes(self):
        self.assertEqual(self.errors(), [])

    def test_include_of_a_folder_above(self):
        errors = self.errors({"api/request.cc": '#include "weft/runner/runner.h"\n'})
        self.assertEqual(len(errors), 2, errors)  # The include, and the dependency that it would need.
        self.assertIn("src/weft/api/request.cc:2: api must not include weft/runner/runner.h", errors[0])

    def test_include_of_a_folder_above_in_angle_brackets_and_with_spaces(self):
        errors = self.errors({"core/error.h": "  #  include <weft/api/request.h>\n"})
        self.assertIn("src/weft/core/error.h:3: core must not include weft/api/request.h", errors[0])

    def test_include_of_a_folder_on_the_same_line(self):
        errors = self.errors({"text/tokenizer.cc": '#include "weft/api/request.h"\n'})
        self.assertIn("text must not include weft/api/request.h", errors[0])

    def test_tests_may_not_reach_above_either(self):
        errors = self.errors({"runner/runner_test.cc": '#include "weft/cli/flags.h"\n'})
        self.assertIn("runner/runner_test.cc:3: runner must not include weft/cli/flags.h", errors[0])

    def test_library_without_a_declared_dependency(self):
        errors = self.errors({"runner/runner.cc": '#include "weft/core/error.h"\n'})
        self.assert_one(errors, "weft_runner lacks the dependency core", "src/weft/runner/runner.cc:5")

    def test_header_needs_the_dependency_too(self):
        errors = self.errors({"runner/runner.h": '#include "weft/text/tokenizer.h"\n'})
        self.assert_one(errors, "weft_runner lacks the dependency text", "src/weft/runner/runner.h:4")

    def test_program_may_rely_on_its_libraries_dependencies_but_no_more(self):
        self.assertEqual(self.errors({"cli/main.cc": '#include "weft/core/error.h"\n'}), [])
        errors = self.errors({"cli/main.cc": '#include "weft/text/tokenizer.h"\n'})
        self.assert_one(errors, "weft lacks the dependency text")

    def test_program_that_does_not_link_what_its_headers_include(self):
        errors = self.errors({"runner/test_support.h": '#include "weft/text/tokenizer.h"\n',
                              "runner/runner_test.cc": '#include "weft/runner/test_support.h"\n'})
        self.assert_one(errors, "runner_test lacks the dependency text", "src/weft/runner/test_support.h:1")

    def test_headers_of_a_second_library_are_not_the_folders(self):
        changed = {"runner/fakes.cc": '#include "weft/runner/fakes.h"\n',
                   "runner/fakes.h": '#include "weft/text/tokenizer.h"\n'}
        fakes = TARGETS + "runner|weft_runner_fakes|STATIC_LIBRARY|{}|runner/fakes.cc\n"
        self.assertEqual(self.errors(changed, targets=fakes.format("weft_text")), [])
        errors = self.errors(changed, targets=fakes.format("weft_api"))
        self.assert_one(errors, "weft_runner_fakes lacks the dependency text")

    def test_dependency_that_nothing_includes(self):
        errors = self.errors(targets=relinked("weft_runner", "weft_api;weft_text"))
        self.assert_one(errors, "weft_runner declares the dependency text, which nothing in it includes")

    def test_target_that_depends_on_a_folder_above(self):
        errors = self.errors(targets=relinked("runner_test", "weft_runner;weft_cli"))
        self.assert_one(errors, "runner_test depends on cli, which is above runner")

    def test_library_that_depends_on_its_own_line(self):
        errors = self.errors(targets=relinked("weft_text", "weft_core;weft_api"))
        self.assertIn("weft_text depends on api, which is not below text", errors[0])

    def test_source_that_no_target_compiles(self):
        self.assert_one(self.errors({"runner/lost_test.cc": ""}), "runner/lost_test.cc: no CMake target compiles it")

    def test_relative_include(self):
        self.assert_one(self.errors({"cli/main.cc": '#include "flags.h"\n'}), 'cli/main.cc:3: write "flags.h" as')
        self.assert_one(self.errors({"cli/main.cc": '#include "../core/error.h"\n'}), 'write "../core/error.h" as')

    def test_include_of_no_folder(self):
        self.assert_one(self.errors({"cli/main.cc": '#include "weft/misc/x.h"\n'}), "weft/misc/x.h is in no folder")

    def test_folder_outside_the_list(self):
        self.assert_one(self.errors({"misc/x.h": ""}), "src/weft/misc: not in the layers list")

    def test_listed_folder_that_does_not_exist(self):
        self.assert_one(self.errors(architecture=ARCHITECTURE.replace("cli\n", "cli\ntransfer\n")), "names transfer")

    def test_cmake_order_against_the_list(self):
        lines = TARGETS.splitlines()
        errors = self.errors(targets="\n".join([lines[-1]] + lines[:-1]))
        self.assert_one(errors, "CMakeLists.txt: takes cli before core")

    def test_list_must_be_one_and_without_repetition(self):
        with self.assertRaises(SystemExit):
            self.errors(architecture="# no list\n")
        with self.assertRaises(SystemExit):
            self.errors(architecture=ARCHITECTURE.replace("cli\n", "cli\ncore\n"))


if __name__ == "__main__":
    unittest.main()
