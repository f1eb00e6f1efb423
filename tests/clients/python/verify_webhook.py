"""Checks webhook calls with the Standard Webhooks library, as a receiver does.

    pip install -r requirements.txt
    python verify_webhook.py <calls

Each line of standard input is a JSON object: the secret (`whsec_…`), the call's headers and its body. Each is answered by a line: `ok`, or `refused: ` and why.
"""

import json
import sys

from standardwebhooks.webhooks import Webhook

for line in sys.stdin:
    call = json.loads(line)
    try:
        Webhook(call["secret"]).verify(call["body"], call["headers"])
        print("ok")
    except Exception as error:  # The library refuses with errors of several kinds.
        print(f"refused: {error!r}")
