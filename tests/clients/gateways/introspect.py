"""Introspection (RFC 7662) as Authlib does it: a client that nobody here wrote. Prints what it is told as JSON."""

import json
import os
import sys

from authlib.integrations.requests_client import OAuth2Session


def main():
    endpoint, credentials = os.environ["KEYWARD_HTTP"] + "/oauth2/introspect", os.environ["KEYWARD_TOKEN"]
    session = OAuth2Session("gateway", credentials, token_endpoint_auth_method="client_secret_basic")
    answer = session.introspect_token(endpoint, token=sys.stdin.read(), token_type_hint="access_token")
    answer.raise_for_status()
    json.dump(answer.json(), sys.stdout)


main()
