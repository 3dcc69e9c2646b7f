"""Finds out whether a template takes the content of messages as text or as a list of parts, from its syntax tree (vLLM's idea).

child.py loads this file by its path, so it imports jinja2 and the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import nodes

TEXT, EITHER, PARTS = "text", "either", "parts"

# What an expression may stand for.
_MESSAGES, _MESSAGE, _CONTENT, _PART = "messages", "message", "content", "part"
_ELEMENT = {_MESSAGES: _MESSAGE, _CONTENT: _PART}
_ELEMENT_FILTERS = ("first", "last", "random")
_LIST_FILTERS = ("list", "reverse", "select", "reject", "selectattr", "rejectattr", "sort", "unique", "default", "d")
_PART_FILTERS = ("map", "selectattr", "rejectattr", "groupby")  # read a field of each part

Kinds = frozenset[str]


def content_form(template: nodes.Template) -> str:
    """Return the form of content that the template takes.

    Returns:
        TEXT if it never looks into content; PARTS if it goes through content, or reads a part of it, wherever that is; EITHER if it does
        so only where it has asked whether the content is a string.
    """
    guarded = list(_Tree(template).readings_of_parts())
    return TEXT if not guarded else EITHER if all(guarded) else PARTS


class _Tree:
    """The possible meanings of the names in a template, wherever they are set; scopes and the order of statements are ignored."""

    def __init__(self, template: nodes.Template) -> None:
        self._template = template
        self._names: dict[str, Kinds] = {"messages": frozenset({_MESSAGES})}
        self._macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        known = -1
        while known < (known := sum(map(len, self._names.values()))):
            for node in template.find_all((nodes.Assign, nodes.For, nodes.Call)):
                self._learn(node)

    def readings_of_parts(self) -> Iterator[bool]:
        """Yield, for every place where content is read as a list of parts, whether the template asks there if it is a string."""
        return self._readings(self._template, guarded=False)

    def _readings(self, node: nodes.Node, *, guarded: bool) -> Iterator[bool]:
        if isinstance(node, (nodes.If, nodes.CondExpr)):
            tests = [node.test, *(other.test for other in getattr(node, "elif_", ()))]
            guarded = guarded or any(map(self._asks_for_string, tests))
        if self._reads_parts(node):
            yield guarded
        for child in node.iter_child_nodes():
            yield from self._readings(child, guarded=guarded)

    def _reads_parts(self, node: nodes.Node) -> bool:
        if isinstance(node, nodes.For):
            return _CONTENT in self._kinds(node.iter)
        if isinstance(node, nodes.Filter):
            return node.name in _PART_FILTERS and _CONTENT in self._kinds(node.node)
        return _key(node) is not None and _PART in self._kinds(getattr(node, "node", None))

    def _asks_for_string(self, test: nodes.Node) -> bool:
        asked = [test, *test.find_all(nodes.Test)]
        return any(isinstance(each, nodes.Test) and each.name == "string" and _CONTENT in self._kinds(each.node) for each in asked)

    # -- names ------------------------------------------------------------------------------------------------------------------------

    def _learn(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.For):
            self._name(node.target, self._elements(node.iter))
        elif isinstance(node, nodes.Assign):
            self._name(node.target, self._kinds(node.node))
            if isinstance(node.target, nodes.Name) and isinstance(node.node, nodes.Call):  # namespace(name=...)
                for given in node.node.kwargs:
                    self._add(f"{node.target.name}.{given.key}", self._kinds(given.value))
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name in self._macros:
            self._learn_arguments(self._macros[node.node.name], node)

    def _learn_arguments(self, macro: nodes.Macro, call: nodes.Call) -> None:
        for parameter, value in zip(macro.args, call.args, strict=False):
            self._add(parameter.name, self._kinds(value))
        for given in call.kwargs:
            self._add(given.key, self._kinds(given.value))

    def _name(self, target: nodes.Node, kinds: Kinds) -> None:
        if isinstance(target, nodes.Name):
            self._add(target.name, kinds)
        elif isinstance(target, nodes.NSRef):
            self._add(f"{target.name}.{target.attr}", kinds)
        elif isinstance(target, nodes.Tuple):  # for place, message in ...
            for item in target.items:
                self._name(item, kinds)

    def _add(self, name: str, kinds: Kinds) -> None:
        if kinds:
            self._names[name] = self._names.get(name, frozenset()) | kinds

    # -- expressions ------------------------------------------------------------------------------------------------------------------

    def _kinds(self, node: Any) -> Kinds:
        """Return the possible meanings of an expression."""
        if isinstance(node, nodes.Name):
            return self._names.get(node.name, frozenset())
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._item(node)
        if isinstance(node, nodes.Call):
            return self._call(node)
        if isinstance(node, nodes.Filter):
            return self._filtered(node)
        if isinstance(node, nodes.CondExpr):
            return self._kinds(node.expr1) | self._kinds(node.expr2)
        if isinstance(node, (nodes.And, nodes.Or, nodes.Add)):
            return self._kinds(node.left) | self._kinds(node.right)
        if isinstance(node, nodes.List):
            return self._union(node.items) & {_MESSAGE} and frozenset({_MESSAGES})
        return frozenset()

    def _item(self, node: nodes.Getattr | nodes.Getitem) -> Kinds:
        key = _key(node)
        if key is None:
            is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
            return self._kinds(node.node) if is_slice else self._elements(node.node)
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{key}" in self._names:
            return self._names[f"{node.node.name}.{key}"]
        return self._content(node.node, key)

    def _call(self, node: nodes.Call) -> Kinds:
        """Return the possible meanings of a call; only message.get('content') has any."""
        called, args = node.node, node.args
        if isinstance(called, nodes.Getattr) and called.attr == "get" and args and isinstance(args[0], nodes.Const):
            return self._content(called.node, args[0].value) | self._union(args[1:])
        return frozenset()

    def _content(self, node: nodes.Node, key: object) -> Kinds:
        return frozenset({_CONTENT}) if key == "content" and _MESSAGE in self._kinds(node) else frozenset()

    def _filtered(self, node: nodes.Filter) -> Kinds:
        if node.name in _ELEMENT_FILTERS:
            return self._elements(node.node)
        return self._kinds(node.node) if node.name in _LIST_FILTERS else frozenset()

    def _elements(self, node: Any) -> Kinds:
        return frozenset(_ELEMENT[kind] for kind in self._kinds(node) if kind in _ELEMENT)

    def _union(self, several: Sequence[nodes.Node]) -> Kinds:
        return frozenset().union(*map(self._kinds, several))


def _key(node: nodes.Node) -> str | None:
    """Return the name in x.name and x['name']; None for any other node."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None
