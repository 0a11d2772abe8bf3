"""The endpoints, as a FastAPI application."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from porter import __version__
from porter.serve.answers import (
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    TokenizeAnswer,
)
from porter.serve.chat import create_chat
from porter.serve.completions import create_completion
from porter.serve.errors import ANSWERED, ApiError, ErrorBody, on_answered, on_bug, on_http_error, on_invalid
from porter.serve.middleware import ApiKeys, BodyLimit, RequestId
from porter.serve.protocol import ChatFields, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from porter.serve.sampling import check_token_ids
from porter.serve.service import Service
from porter.serve.streaming import ClientGone

_GONE = 499  # nobody reads it; it only shows in the log
_STREAM: dict[str, Any] = {"text/event-stream": {}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request can't be served."},
    401: {"model": ErrorBody, "description": "No valid API key was given."},
    404: {"model": ErrorBody, "description": "The model does not exist."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "The queue is full; Retry-After says when to try again."},
    500: {"model": ErrorBody, "description": "The engine failed while it worked on the request."},
    503: {"model": ErrorBody, "description": "The engine is starting, or the server is shutting down."},
}


def _answers(model: Any, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    success: dict[str, Any] = {"model": model, "description": "The answer."}
    return {**_ERRORS, 200: success | ({"content": _STREAM} if streams else {})}


def build_app(service: Service) -> ASGIApp:
    """The application with all that a request passes before it."""
    app = FastAPI(title="porter", version=__version__, docs_url=None, redoc_url=None)
    for error in ANSWERED:
        app.add_exception_handler(error, on_answered)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    app.add_exception_handler(ClientGone, _on_gone)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    return _guarded(app, service)


def _guarded(app: ASGIApp, service: Service) -> ASGIApp:
    options = service.options
    app = BodyLimit(app, options.max_body_bytes)
    if options.api_keys:
        app = ApiKeys(app, options.api_keys)
    if options.allowed_origins:
        app = CORSMiddleware(app, options.allowed_origins, allow_methods=["*"], allow_headers=["*"])
    return RequestId(app)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_answers(CompletionAnswer, streams=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await create_completion(service, body, request, request.state.request_id)

    @app.post("/v1/chat/completions", responses=_answers(ChatAnswer, streams=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await create_chat(service, body, request, request.state.request_id)


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizing, facts = service.tokenizing, service.facts

    @app.post("/tokenize", responses=_answers(TokenizeAnswer))
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text or of a conversation."""
        service.check_model(body.model)
        if body.prompt is not None:
            tokens = await tokenizing.encode(body.prompt, body.add_special_tokens is not False)
        else:
            chat = ChatFields(
                messages=body.messages or [],
                add_generation_prompt=body.add_generation_prompt,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            tokens = await tokenizing.encode_chat(chat)
        strings = tokenizing.token_strings(tokens) if body.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": facts.max_model_len, "tokens": tokens, "token_strs": strings}
        return JSONResponse(answer)

    @app.post("/detokenize", responses=_answers(DetokenizeAnswer))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        check_token_ids(body.tokens, facts)
        return JSONResponse({"prompt": await tokenizing.decode(body.tokens)})


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_answers(ModelList))
    async def models() -> Response:
        """The names of the model that is served."""
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.model_names]})

    @app.get("/v1/models/{model:path}", responses=_answers(ModelCard))
    async def model(model: str) -> Response:
        """What is known about a model."""
        return JSONResponse(_card(service, service.check_model(model)))

    @app.get("/health", responses=_answers(dict[str, str]))
    async def health() -> Response:
        """200 while requests are taken."""
        if not service.client.ready or service.client.draining:
            raise ApiError(503, "the server takes no requests now", code="unavailable")
        return JSONResponse({"status": "ok"})

    @app.get("/version", responses=_answers(dict[str, str]))
    async def version() -> Response:
        """porter's version."""
        return JSONResponse({"version": __version__})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(service.client.metrics.text(), media_type="text/plain; version=0.0.4")


def _card(service: Service, name: str) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "porter",
        "root": service.model_names[0],
        "max_model_len": service.facts.max_model_len,
    }


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=_GONE)
