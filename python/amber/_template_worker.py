"""Renders chat templates in a process of its own: JSON requests in, answers out, one a line.

A template comes with a model file from anywhere. jinja2's sandbox keeps it from Python's objects,
but not from running for ever or filling the memory, and no guard inside one interpreter stops every
way to do that (nested loops, doubled strings, the repr of a list that holds itself twice over). A
process with limits does. chat.py starts it as a script, with the folders of jinja2 as arguments.
"""

import datetime
import json
import sys

sys.path += sys.argv[1:]

try:
    import resource
except ImportError:  # no such limits on this system; chat.py's deadline still holds
    resource = None

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, is_internal_attribute
from jinja2.utils import Namespace

NAME = "chat template"


class GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}: marks answers for training; here just its content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As Hugging Face templates expect it: plain JSON, not escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


class TemplateDict:
    """dict(...) and dict.fromkeys(...), without the type itself."""

    def __call__(self, *args, **values):
        return dict(*args, **values)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """namespace(...), whose attributes may not reach for an object's inner ones."""

    def __init__(*args, **values):  # no name for self: it may be among the values
        values = dict(*args[1:], **values)
        for name in values:
            TemplateNamespace.check(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name, value):
        TemplateNamespace.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace: names that begin with _ are unsafe, found {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """An object's inner attributes are an error, where jinja2's sandbox takes them for undefined
    and prints nothing. No honest template asks for them; a user should know of one that does."""

    def unsafe_undefined(self, obj, attribute):
        if attribute.startswith("_") or is_internal_attribute(obj, attribute):
            raise SecurityError(
                f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe"
            )
        return super().unsafe_undefined(obj, attribute)


def environment():
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    env.globals["dict"] = TemplateDict()
    env.globals["namespace"] = TemplateNamespace
    return env


def error_line(error):
    """The template's line that an exception came from, or None."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def render(env, request):
    try:
        template = env.from_string(request["template"])  # compiled again: far below a millisecond
        size, pieces = 0, []
        for piece in template.generate(request["variables"]):
            size += len(piece)
            if size > request["max_chars"]:
                raise TemplateError(f"more than {request['max_chars']} characters of output")
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"needs more than {request['memory'] >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "recursion without end"}
    except Exception as error:
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        return {"error": f"{kind}{error}", "line": error_line(error)}


def main():
    env = environment()
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogatepass")
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogatepass")
    for line in sys.stdin:
        request = json.loads(line)
        if resource:
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            # Ends this process should chat.py no longer be there to do it.
            resource.setrlimit(resource.RLIMIT_CPU, (int(used + request["seconds"]) + 2, hard))
            resource.setrlimit(resource.RLIMIT_DATA, (request["memory"], request["memory"]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        print(json.dumps(render(env, request)), flush=True)


if __name__ == "__main__":
    main()
