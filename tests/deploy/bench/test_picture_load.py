"""A request with a picture holds that picture."""

from __future__ import annotations

import base64
import json

from deploy.bench.picture_load import picture_request


def test_the_picture_is_in_the_request_as_a_data_uri() -> None:
    head, _, body = picture_request("m", b"\xff\xd8 pixels").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    picture, _ = json.loads(body)["messages"][0]["content"]
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", b"\xff\xd8 pixels")
