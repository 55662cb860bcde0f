"""Extractive question answering: windows over the context for the engine, spans of it for the client."""

from gptj_serve.api.huggingface_responses import QAAnswer
from gptj_serve.api.huggingface_schemas import QAInputs, QAParameters, QARequest
from gptj_serve.api.service import Service, off_loop, run_all
from gptj_serve.errors import InvalidRequestError
from gptj_serve.extractive_qa import QAOptions, Window, best_answers, make_windows
from gptj_serve.tokenizer import Encoding
from gptj_serve.types import Task


async def answer(service: Service, request: QARequest) -> list[list[QAAnswer]]:
    """Per question its answers, best first."""
    head = service.choose_head(request.model, "qa_outputs", "question answering")
    inputs = request.inputs if isinstance(request.inputs, list) else [request.inputs]
    service.check_batch(inputs)
    options = QAOptions(**request.parameters.model_dump())
    max_windows = max(1, service.config.ingress.max_qa_windows // len(inputs))
    return await run_all([_answer_one(service, item, options, head, max_windows) for item in inputs])


async def _answer_one(
    service: Service, inputs: QAInputs, options: QAOptions, head: str, max_windows: int
) -> list[QAAnswer]:
    def tokenize() -> tuple[Encoding, list[Window]]:
        context = service.tokenizer.encode_with_offsets(inputs.context)
        n_positions = service.model.n_positions
        return context, make_windows(service.tokenizer, inputs.question, context, options, n_positions, max_windows)

    try:
        context, windows = await off_loop(len(inputs.question) + len(inputs.context), tokenize)
    except InvalidRequestError as error:
        parent = "parameters" if error.field in QAParameters.model_fields else "inputs"
        raise InvalidRequestError(f"{parent}.{error.field}", error.value, error.reason) from None
    logits = await run_all([service.values(Task.QA, window.token_ids, head=head) for window in windows])
    answers = best_answers(inputs.context, context, windows, [matrix.rows() for matrix in logits], options)
    return [{"answer": found.answer, "score": found.score, "start": found.start, "end": found.end} for found in answers]
