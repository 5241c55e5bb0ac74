"""Prints the parameters of the methods that the plugin uses, as a wheel of vLLM has them; nothing is installed.

pip download --no-deps vllm==0.33.0
python tests/serving/signatures.py vllm-0.33.0-*.whl     # an entry of signatures.json
"""

import ast
import json
import sys
from zipfile import ZipFile

from smoa_kernels.serving import vllm as plugin


def signatures(wheel):
    """By path below vllm.lora: the names of a method's parameters; None where the wheel lacks it."""
    found = {}
    with ZipFile(wheel) as files:
        for path in plugin._METHODS:
            module, kind, name = path.rsplit(".", 2)
            tree = ast.parse(files.read(f"vllm/lora/{module.replace('.', '/')}.py"))
            own = {one.name: one for one in tree.body if isinstance(one, ast.ClassDef)}.get(kind)
            methods = {one.name: one for one in getattr(own, "body", ()) if isinstance(one, ast.FunctionDef)}
            found[path] = _parameters(methods[name]) if name in methods else None
    return found


def _parameters(method):
    given = method.args
    names = [
        one for one in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg) if one
    ]
    bound = any(ast.unparse(one) == "classmethod" for one in method.decorator_list)
    return " ".join(one.arg for one in names[bound:])


if __name__ == "__main__":
    print(json.dumps(signatures(sys.argv[1]), indent=4))
