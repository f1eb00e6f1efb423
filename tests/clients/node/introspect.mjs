// Introspection (RFC 7662) as openid-client does it: a client that nobody here wrote. Prints what it is told as JSON.
import * as oauth from 'openid-client';

const base = process.env.KEYWARD_HTTP;
const server = { issuer: base, introspection_endpoint: `${base}/oauth2/introspect` };
const config = new oauth.Configuration(server, 'gateway', undefined, oauth.ClientSecretBasic(process.env.KEYWARD_TOKEN));
oauth.allowInsecureRequests(config);
let token = '';
for await (const piece of process.stdin) token += piece;
console.log(JSON.stringify(await oauth.tokenIntrospection(config, token, { token_type_hint: 'access_token' })));
