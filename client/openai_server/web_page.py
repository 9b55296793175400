"""The page for chats at /, with --ui. It asks this server as any client does, also with a key.

Its files need no key, load nothing from elsewhere and may run no other script.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response

router = APIRouter()

# Path -> file and media type.
FILES = {
    "/": ("page.html", "text/html"),
    "/ui/page.js": ("page.js", "text/javascript"),
    "/ui/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def _show(request: Request) -> Response:
    name, media_type = FILES[request.url.path]
    content = (files("gllm_client.openai_server") / "ui" / name).read_bytes()
    return Response(content, headers=_HEADERS, media_type=media_type)


for _path in FILES:
    router.add_api_route(_path, _show, methods=["GET"])
