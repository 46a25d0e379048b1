"""LangChain's OpenAI client, as its users write it, against our server in front of a strict upstream."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai_upstream import LAST, Json, chunk, hello, openai_upstream, vector, whole
from pydantic import BaseModel
from server_harness import serving

from autobot_llm.interface import LLMInterface
from autobot_llm.settings import CloudSettings, Settings

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


class City(BaseModel):
    name: str


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def script(body: Json) -> Json | list[Json]:
    if "response_format" in body:
        return whole({"content": '{"name": "Paris"}'})
    if "tools" not in body or body["messages"][-1]["role"] == "tool":
        return hello(body)
    if not body.get("stream"):
        return whole({"tool_calls": [CALL]}, "tool_calls")
    return [chunk({"tool_calls": [{"index": 0, **CALL}]}), chunk({}, finish="tool_calls"), LAST]


async def test_chat_streams_tools_schemas_and_embeddings_work_as_they_are_written() -> None:
    async with openai_upstream(script) as upstream:
        clouds = {"up": CloudSettings(endpoint=upstream.url, api_key="k")}
        settings = Settings(port=0, provider="cloud", clouds=clouds, default_model="up/m-1")
        async with serving(settings, LLMInterface(settings), None) as server:  # type: ignore[type-var]
            options: Any = {"base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 0}
            chat = ChatOpenAI(model="m-1", temperature=0.2, **options)
            answer = await chat.ainvoke("Hello?")
            pieces = [piece.content async for piece in chat.astream("Hello?")]
            agent = chat.bind_tools([weather])
            asked = await agent.ainvoke("Weather?")
            streamed: Any = None
            async for piece in agent.astream("Weather?"):
                streamed = piece if streamed is None else streamed + piece
            told = await weather.ainvoke(asked.tool_calls[0])
            last = await agent.ainvoke([("user", "Weather?"), asked, told])
            city = await chat.with_structured_output(City).ainvoke("Which city?")
            embedder = OpenAIEmbeddings(model="e-1", check_embedding_ctx_length=False, dimensions=4, **options)
            vectors = await embedder.aembed_documents(["a", "b"])
            # LangChain leaves its connections to the garbage collector.
            await chat.root_async_client.close()
            await embedder.async_client._client.close()
    assert isinstance(answer, AIMessage)
    assert (answer.content, answer.usage_metadata["total_tokens"]) == ("Hello, world", 17)  # type: ignore[index]
    assert "".join(str(piece) for piece in pieces) == "Hello, world"
    expected = [{"name": "weather", "args": {"city": "Paris"}, "id": "c1", "type": "tool_call"}]
    assert asked.tool_calls == streamed.tool_calls == expected
    assert last.content == "Hello, world"
    assert city == City(name="Paris")
    assert vectors == [vector("a", 4), vector("b", 4)]
    assert upstream.complaints == []
