//! `NoticeService`: messages in, one domain method, messages out.

use tonic::{Request, Response, Status};

use super::{Api, Call, call, convert};
use crate::{
    error::Violations,
    notice::Channel,
    notices::{Delivery, FaultRecord, FaultsRequest, NoticeRecord, NoticesRequest},
    proto::{self, notice_service_server::NoticeService},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl NoticeService for Api {
    async fn list_faults(&self, request: Request<proto::ListFaultsRequest>) -> Answer<proto::ListFaultsResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let asked = FaultsRequest {
            workspace: message.workspace,
            principal: message.principal,
            token_id: message.token_id,
            unacknowledged_only: message.unacknowledged_only,
            page_size: message.page_size,
            page_token: message.page_token,
        };
        let (faults, next) = self.notices.faults(&caller, asked).await?;
        Ok(Response::new(proto::ListFaultsResponse {
            faults: faults.into_iter().map(shown_fault).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn acknowledge_fault(&self, request: Request<proto::AcknowledgeFaultRequest>) -> Answer<proto::AcknowledgeFaultResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let fault = self.notices.acknowledge(&caller, &message.id, now).await?;
        Ok(Response::new(proto::AcknowledgeFaultResponse { fault: Some(shown_fault(fault)), propagation: Some(convert::complete()) }))
    }

    async fn list_notices(&self, request: Request<proto::ListNoticesRequest>) -> Answer<proto::ListNoticesResponse> {
        let (Call { caller, .. }, message) = call(request)?;
        let mut violations = Violations::default();
        let asked = NoticesRequest {
            is_dead: is_dead(message.state, &mut violations),
            workspace: message.workspace,
            page_size: message.page_size,
            page_token: message.page_token,
            violations,
        };
        let (notices, next) = self.notices.notices(&caller, asked).await?;
        Ok(Response::new(proto::ListNoticesResponse {
            notices: notices.into_iter().map(shown).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn retry_notice(&self, request: Request<proto::RetryNoticeRequest>) -> Answer<proto::RetryNoticeResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let notice = self.notices.retry(&caller, &message.id, now).await?;
        Ok(Response::new(proto::RetryNoticeResponse { notice: Some(shown(notice)), propagation: Some(convert::complete()) }))
    }

    async fn send_test_notice(&self, request: Request<proto::SendTestNoticeRequest>) -> Answer<proto::SendTestNoticeResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let deliveries = self.notices.test(&caller, &message.workspace, now).await?;
        Ok(Response::new(proto::SendTestNoticeResponse { deliveries: deliveries.into_iter().map(shown_delivery).collect() }))
    }

    async fn rotate_webhook_secret(
        &self,
        request: Request<proto::RotateWebhookSecretRequest>,
    ) -> Answer<proto::RotateWebhookSecretResponse> {
        let (Call { caller, now, .. }, message) = call(request)?;
        let (secret, previous_expire_time) = self.notices.rotate_secret(&caller, &message.workspace, now).await?;
        Ok(Response::new(proto::RotateWebhookSecretResponse {
            webhook_secret: secret.text().reveal().to_owned(),
            previous_expire_time: previous_expire_time.and_then(convert::timestamp),
            propagation: Some(convert::complete()),
        }))
    }
}

/// Which state is asked for; nothing: any.
fn is_dead(state: i32, violations: &mut Violations) -> Option<bool> {
    match proto::NoticeState::try_from(state) {
        Ok(proto::NoticeState::Unspecified) => None,
        Ok(proto::NoticeState::Pending) => Some(false),
        Ok(proto::NoticeState::Dead) => Some(true),
        Err(_) => {
            violations.add("state", "must be NOTICE_STATE_PENDING, NOTICE_STATE_DEAD, or not set");
            None
        }
    }
}

fn shown_fault(fault: FaultRecord) -> proto::Fault {
    proto::Fault {
        id: fault.id,
        workspace: fault.workspace,
        token_id: fault.token_id.to_string(),
        display_name: fault.display_name,
        hint: fault.hint,
        principal: fault.principal,
        days_before: fault.days_before.into(),
        expire_time: convert::timestamp(fault.expire_time),
        raise_time: convert::timestamp(fault.raise_time),
        acknowledge_time: fault.acknowledge_time.and_then(convert::timestamp),
        acknowledged_by: fault.acknowledged_by,
    }
}

fn shown(record: NoticeRecord) -> proto::Notice {
    let state = if record.is_dead { proto::NoticeState::Dead } else { proto::NoticeState::Pending };
    proto::Notice {
        event: convert::notice_event(record.event).into(),
        channel: channel(record.channel).into(),
        state: state.into(),
        token_ids: record.token_ids,
        token_count: i32::try_from(record.token_count).unwrap_or(i32::MAX),
        create_time: convert::timestamp(record.create_time),
        attempt_count: i32::try_from(record.attempts).unwrap_or(i32::MAX),
        next_attempt_time: if record.is_dead { None } else { convert::timestamp(record.due_time) },
        last_error: record.last_error,
        id: record.id,
        workspace: record.workspace,
        recipient: record.recipient,
    }
}

fn channel(channel: Channel) -> proto::NoticeChannel {
    match channel {
        Channel::Mail => proto::NoticeChannel::Mail,
        Channel::Webhook => proto::NoticeChannel::Webhook,
    }
}

fn shown_delivery(delivery: Delivery) -> proto::TestDelivery {
    proto::TestDelivery {
        channel: channel(delivery.channel).into(),
        recipient: delivery.recipient,
        delivered: delivery.error.is_none(),
        error: delivery.error.unwrap_or_default(),
    }
}
