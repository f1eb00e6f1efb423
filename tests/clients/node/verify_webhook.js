// Checks webhook calls with the Standard Webhooks library, as a receiver does.
//
//     npm install
//     node verify_webhook.js <calls
//
// Each line of standard input is a JSON object: the secret (`whsec_…`), the call's headers and its body. Each is answered by a line: `ok`, or `refused: ` and why.
'use strict';

const { readFileSync } = require('node:fs');
const { Webhook } = require('standardwebhooks');

for (const line of readFileSync(0, 'utf8').split('\n').filter(Boolean)) {
  const { secret, headers, body } = JSON.parse(line);
  try {
    new Webhook(secret).verify(body, headers);
    console.log('ok');
  } catch (error) {
    console.log(`refused: ${error}`);
  }
}
