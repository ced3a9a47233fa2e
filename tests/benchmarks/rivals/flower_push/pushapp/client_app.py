"""Takes the weights and says when it had them."""

import time

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Reads every array, as a client that uses them would."""
    size_bytes = sum(array.numpy().nbytes for array in message.content["arrays"].values())
    said = MetricRecord({"had_time": time.time(), "size_bytes": float(size_bytes)})
    return Message(content=RecordDict({"said": said}), reply_to=message)
