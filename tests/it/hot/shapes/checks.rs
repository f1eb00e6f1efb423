//! Random requests that wait at an Envoy.

use keyward::proto::envoy::{
    Address, AttributeContext, CheckRequest, HeaderMap, HeaderValue, SocketAddress,
    address::Address::SocketAddress as At,
    attribute_context::{HttpRequest, Peer, Request},
};
use prost_reflect::prost::Message as _;

use super::{Maker, near_miss};

type Texts = Vec<(&'static str, Vec<u8>)>;

/// A `CheckRequest`, as it goes over the wire.
pub fn request(maker: &mut Maker<'_>) -> Vec<u8> {
    maker.say("{");
    let settings = settings(maker);
    let mut headers = token(maker);
    for (name, value) in [
        ("content-type", "application/grpc"),
        ("content-type", "text/html"),
        ("x-keyward-principal", "root"),
        ("x_keyward_scopes", "keyward:root"),
        ("x-real-ip", "10.1.2.3"),
        ("x-real-ip", "192.0.2.1, 10.1.2.3"),
        ("x-real-ip", "nowhere"),
    ] {
        if maker.once_in(6) {
            maker.say(&format!("{name}={value}"));
            headers.push((name, value.into()));
        }
    }
    let http = maker.once_in(12).then(|| maker.say("without-http"));
    let http = http.is_none().then(|| http_request(maker, headers));
    let address = maker.pick(&["10.1.2.3", "192.0.2.1", "::ffff:10.1.2.3", "2001:db8::7", "", "nowhere"]);
    maker.say(&format!("ip={address:?}"));
    let source = Peer { address: Some(Address { address: Some(At(SocketAddress { address: address.to_owned() })) }) };
    let attributes = AttributeContext {
        source: (!maker.once_in(8)).then_some(source),
        request: Some(Request { http }),
        context_extensions: settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
    };
    let attributes = (!maker.once_in(30)).then_some(attributes);
    let mut message = CheckRequest { attributes }.encode_to_vec();
    if maker.is_wild && maker.once_in(3) {
        maker.damage(&mut message);
    }
    maker.say("}");
    message
}

fn http_request(maker: &mut Maker<'_>, headers: Texts) -> HttpRequest {
    let is_raw = maker.once_in(3);
    maker.say(if is_raw { "raw" } else { "joined" });
    let (method, path) =
        (maker.pick(&["GET", "POST", ""]), maker.pick(&["/api/agents", "/api/agents/7?x=1", "/nowhere", "/api//agents", ""]));
    maker.say(&format!("{method:?} {path:?}"));
    let joined =
        |headers: &Texts| headers.iter().map(|(name, value)| ((*name).to_owned(), String::from_utf8_lossy(value).into_owned())).collect();
    let raw = |headers: Texts| {
        let header = |(name, value): (&str, Vec<u8>)| HeaderValue { key: name.to_owned(), value: String::new(), raw_value: value };
        HeaderMap { headers: headers.into_iter().map(header).collect() }
    };
    HttpRequest {
        method: method.to_owned(),
        path: path.to_owned(),
        headers: if is_raw { std::collections::BTreeMap::default() } else { joined(&headers) },
        header_map: is_raw.then(|| raw(headers)),
    }
}

fn settings(maker: &mut Maker<'_>) -> Vec<(&'static str, &'static str)> {
    let mut settings = Vec::new();
    for (name, values) in [
        ("required_scopes", &["", "agents:list", "agents:create s1:read", "agents:list", "*", "agents"][..]),
        ("audience", &["billing", "billing", "shop", ""]),
        ("workspace", &["default", "other", "no blanks"]),
        ("token_header", &["x-api-key", "X-Api-Key"]),
        ("client_ip_header", &["x-real-ip"]),
        ("strip_token", &["true", "false", "yes"]),
        ("required_scope", &["agents:list"]),
    ] {
        let often = if name == "required_scopes" { 2 } else { 7 };
        if maker.once_in(often) {
            let value = maker.pick(values);
            maker.say(&format!("{name}={value:?}"));
            settings.push((name, value));
        }
    }
    settings
}

fn token(maker: &mut Maker<'_>) -> Texts {
    let (cast, twin) = (maker.cast, maker.twin);
    let secret = maker.secret(&cast.tokens, twin).to_owned();
    let (kind, place) = (maker.below(24), maker.below(secret.len()));
    let bearer = |secret: &str| ("authorization", format!("Bearer {secret}").into_bytes());
    match kind {
        0 => maker.also("no-token", Vec::new()),
        1 => maker.also("twice", vec![bearer(&secret), bearer(&secret)]),
        2 => maker.also("comma", vec![("authorization", format!("Bearer {secret},Bearer {secret}").into_bytes())]),
        3 => maker.also("basic", vec![("authorization", b"Basic YTpi".to_vec())]),
        4 => maker.also("near-miss", vec![bearer(&near_miss(&secret, place))]),
        5 => maker.also("no-text", vec![("authorization", b"Bearer ".to_vec())]),
        6 => maker.also("lower-case", vec![("authorization", format!("bearer {secret}").into_bytes())]),
        7 => maker.also("not-utf8", vec![("authorization", [b"Bearer ", secret.as_bytes(), b"\xff"].concat())]),
        8 | 9 => maker.also("api-key", vec![("x-api-key", secret.into_bytes())]),
        10 => maker.also("both", vec![bearer(&secret), ("x-api-key", secret.into_bytes())]),
        _ => vec![bearer(&secret)],
    }
}
