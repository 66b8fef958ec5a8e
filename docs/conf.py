"""How Sphinx builds the site from these pages and the package's docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.inspect import stringify_signature
from tensordict import is_tensorclass

from torchrl_sglang_hidden import __version__

project = "torchrl-sglang-hidden"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = html_show_sourcelink = html_show_copyright = False

# A name in single backticks is a link to its entry in the API reference.
default_role = "py:obj"
# One argument a line where a signature is longer than this.
maximum_signature_line_length = 100
# Types stand beside the arguments that they belong to.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
# "Outputs" and "Shapes" are sections of this package's docstrings beside Google's.
napoleon_custom_sections = ["Outputs", "Shapes"]


def read_tensorclass_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Read a TensorClass's docstring from its source; tensordict replaces it."""
    if what == "class" and is_tensorclass(obj):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
        assert isinstance(definition, ast.ClassDef)
        lines[:] = (ast.get_docstring(definition) or "").splitlines()


def separate_plurals(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Separate a link from a letter behind it, as in "`HiddenSpec`s"."""
    lines[:] = [re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def read_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Show a class's own arguments, where Sphinx finds its metaclass's."""
    if what != "class" or not (
        is_tensorclass(obj) or signature == "(*args, **kwargs)"
    ):
        return signature, returned
    if is_tensorclass(obj):
        return "", None
    own = inspect.signature(obj.__init__)
    own = own.replace(parameters=list(own.parameters.values())[1:])
    return stringify_signature(
        own, show_annotation=False, show_return_annotation=False
    ), None


def link_class(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.Node | None:
    """Link a field, such as `HiddenSpec.layers`, and a class by its bare name."""
    name = node["reftarget"].rpartition(".")[0] or node["reftarget"]
    if node["reftype"] != "obj" or not name[:1].isupper():
        return None
    node["refspecific"] = (
        True  # the class may be documented under its module's name
    )
    python = env.domains.python_domain
    return python.resolve_xref(
        env, node["refdoc"], app.builder, "obj", name, node, shown
    )


def setup(app: Sphinx) -> None:
    """Connect the functions above; napoleon reads docstrings at priority 500."""
    app.connect(
        "autodoc-process-docstring", read_tensorclass_docstring, priority=100
    )
    app.connect("autodoc-process-docstring", separate_plurals, priority=200)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("missing-reference", link_class)
