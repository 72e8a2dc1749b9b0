"""The README's Python blocks run, and results have the shapes that their comments state."""

import ast
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# "name = ...  # (1, 2)" on the line where the statement ends; two names, two shapes.
STATED = re.compile(r"#\s(\([\d, ]+\)(?:, \([\d, ]+\))*)(?=$|,)")


def stated_shapes(block: str) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every assignment whose last line states the shape of what it assigns."""
    lines = block.splitlines()
    stated = []
    for node in ast.parse(block).body:
        if not isinstance(node, ast.Assign) or node.end_lineno is None:
            continue
        comment = STATED.search(lines[node.end_lineno - 1])
        if comment is None:
            continue
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
        shapes = re.findall(r"\([\d, ]+\)", comment[1])
        stated += [
            (target.id, ast.literal_eval(shape))
            for target, shape in zip(targets, shapes, strict=False)
            if isinstance(target, ast.Name)
        ]
    return stated


def test_blocks_are_found():
    assert len(BLOCKS) >= 12
    assert all(stated_shapes(block) for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block(block):
    scope: dict = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), scope)
    checked = {name: scope[name].shape for name, _ in stated_shapes(block)}
    assert checked == dict(stated_shapes(block))
