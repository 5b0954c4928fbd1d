"""An OpenAI-compatible server that cites its evidence, and a page that shows how an answer comes about.

settings.py    the options of a server
engine.py      one thread that owns the decoder; requests join its running batch
stream.py      what becomes of a request, as events on an asyncio loop
systems.py     the models offered: the co-supervised one, closed-book, other retrievers
errors.py      errors in OpenAI's shape
fields.py      what requests share: strict fields, sampling, messages to a prompt
evidence.py    citations, search results and timelines
chat.py        POST /v1/chat/completions
responses.py   POST /v1/responses
passages.py    POST /v1/search and /v1/embeddings, GET /passages/{id}
metrics.py     GET /metrics
limits.py      API key, size of a body, headers
app.py         all of it as an ASGI application
page.html      the page at /
server.py      uvicorn around it
"""
