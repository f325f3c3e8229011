use super::*;
use crate::id::PageNo;
use crate::io::framed::serve;
use std::pin::Pin;
use tokio::net::{TcpListener, TcpStream};

/// A server that welcomes everyone, answers reads, never answers flushes, and ends at a write.
async fn server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(one_connection(stream));
        }
    });
    address
}

async fn one_connection(stream: TcpStream) {
    let mut frames = FrameStream::new(stream);
    let request = frames.next().await.unwrap().unwrap();
    let hello: Hello = decode_control(request.payload.clone()).unwrap();
    if hello.cluster_id.is_some() {
        let refusal = request.refuse(Status::WrongCluster, "another cluster");
        return frames.send(refusal).await.unwrap();
    }
    let welcome = Welcome {
        version: wire::VERSION,
        cluster_id: None,
        node: NodeNo(1),
        verifier: hello.connection,
    };
    let reply = request.answer(Status::Ok, encode_control(&welcome));
    frames.send(reply).await.unwrap();
    let (end, mut ended) = tokio::sync::mpsc::channel::<()>(1);
    let handler = |request: Frame| {
        let end = end.clone();
        async move {
            match request.kind {
                Kind::Read => request.answer(Status::Ok, Bytes::from(vec![7; 100_000]).into()),
                Kind::Write => {
                    end.send(()).await.unwrap();
                    std::future::pending().await
                }
                _ => std::future::pending().await,
            }
        }
    };
    tokio::select! {
        _ = serve(frames, handler) => {}
        _ = ended.recv() => {}
    }
}

fn peers(cluster_id: Option<String>) -> Arc<Peers> {
    Arc::new(Peers::new(
        Arc::new(Tcp),
        Arc::new(Hlc::follower()),
        1,
        cluster_id,
        NodeNo(0),
    ))
}

fn request(kind: Kind) -> Frame {
    Frame::request(kind, VolumeId(1))
}

#[tokio::test]
async fn calls_are_pipelined_and_answered_out_of_order() {
    let (peers, address) = (peers(None), server().await);
    let link = peers.link(&address).await.unwrap();
    let stuck = link.call(request(Kind::Flush));
    let reads = (0..50).map(|_| link.call(request(Kind::Read)));
    tokio::select! {
        _ = stuck => panic!("the flush was answered"),
        replies = futures_util::future::join_all(reads) => {
            assert!(replies.iter().all(|reply| reply.as_ref().unwrap().payload.len() == 100_000));
        }
    }
}

#[tokio::test]
async fn a_lost_connection_fails_open_calls_and_the_next_call_connects_again() {
    let (peers, address) = (peers(None), server().await);
    let link = peers.link(&address).await.unwrap();
    let (flush, write) = tokio::join!(
        link.call(request(Kind::Flush)),
        link.call(request(Kind::Write))
    );
    assert!(matches!(flush, Err(LinkError::Lost { .. })));
    assert!(matches!(write, Err(LinkError::Lost { .. })));
    assert!(link.is_ended());
    peers.call(&address, request(Kind::Read)).await.unwrap();
    let again = peers.link(&address).await.unwrap();
    assert_eq!(
        again.welcome().verifier,
        2,
        "the second connection of this requester"
    );
}

#[tokio::test]
async fn refusals_and_dead_addresses_say_why() {
    let address = server().await;
    let refused = peers(Some("x".to_owned())).link(&address).await;
    let text = refused.err().unwrap().to_string();
    assert!(
        text.contains("another cluster") && text.contains(&address),
        "{text}"
    );
    let nobody = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let refused = peers(None).link(&nobody.to_string()).await;
    assert!(matches!(refused, Err(LinkError::Connect { .. })));
}

#[test]
fn control_payloads_must_be_consumed_whole() {
    let mut bytes = encode_control(&5u32).into_bytes().to_vec();
    assert_eq!(
        decode_control::<u32>(Bytes::from(bytes.clone()).into()),
        Ok(5)
    );
    bytes.push(0);
    assert!(decode_control::<u32>(Bytes::from(bytes).into()).is_err());
    assert!(decode_control::<u32>(wire::Payload::default()).is_err());
}

/// Polls a future once.
async fn once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx))).await
}

/// A server that reads nothing before it is told to; the pages of the writes that reach it then.
async fn late_reader(listener: TcpListener, go: oneshot::Receiver<()>) -> Vec<u32> {
    let (stream, _) = listener.accept().await.unwrap();
    let mut frames = FrameStream::new(stream);
    let hello = frames.next().await.unwrap().unwrap();
    let welcome = Welcome {
        version: wire::VERSION,
        cluster_id: None,
        node: NodeNo(1),
        verifier: 1,
    };
    let welcome = hello.answer(Status::Ok, encode_control(&welcome));
    frames.send(welcome).await.unwrap();
    go.await.unwrap();
    let mut pages = vec![];
    loop {
        let frame = frames.next().await.unwrap().unwrap();
        match frame.kind {
            Kind::Write => pages.push(frame.page.0),
            _ => return pages,
        }
    }
}

/// Calls that are given up while their frames wait, in the outbox or behind a connection that takes
/// nothing, are not sent; a frame that was begun is sent whole, and the others stay in order.
#[tokio::test]
async fn what_is_given_up_before_it_was_sent_is_not_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (go, wait) = oneshot::channel();
    let server = tokio::spawn(late_reader(listener, wait));
    let link = peers(None).link(&address).await.unwrap();
    let write = |page: u32| {
        let mut frame = request(Kind::Write);
        frame.page = PageNo(page);
        frame.payload = Bytes::from(vec![1; 16 << 20]).into();
        link.call(frame)
    };
    let mut calls: Vec<_> = (0..6).map(|page| Some(Box::pin(write(page)))).collect();
    for call in calls.iter_mut().flatten() {
        assert!(once(call).await.is_pending());
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    for page in [0, 2, 5] {
        calls[page] = None;
    }
    let mut in_outbox = Box::pin(write(6));
    assert!(once(&mut in_outbox).await.is_pending());
    drop(in_outbox);
    link.post(request(Kind::SpanEnd));
    go.send(()).unwrap();
    assert_eq!(server.await.unwrap(), [0, 1, 3, 4]);
}
