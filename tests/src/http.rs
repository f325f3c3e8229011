//! Administration over HTTP, through curl.

use crate::program::try_run;
use crate::server::Server;
use blockd::node::config::HTTP_PORT;
use serde_json::Value;
use std::path::PathBuf;

/// An answer.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    pub status: u16,
    pub text: String,
}

impl HttpAnswer {
    /// The value of an answer in JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        let parsed = serde_json::from_str(&self.text);
        parsed.unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The kind and the message of an error.
    #[must_use]
    pub fn error(&self) -> (String, String) {
        let error = &self.json()["error"];
        let text = |key: &str| error[key].as_str().unwrap().to_owned();
        (text("kind"), text("message"))
    }
}

/// One way to a server: its unix socket, or TCP with or without a token.
#[derive(Clone, Debug)]
pub struct Http {
    url: String,
    options: Vec<String>,
}

impl Http {
    /// Through the socket in the state directory.
    #[must_use]
    pub fn unix(server: &Server) -> Self {
        let socket = Self::socket(server).display().to_string();
        Self {
            url: "http://localhost".to_owned(),
            options: vec!["--unix-socket".to_owned(), socket],
        }
    }

    /// The path of that socket.
    #[must_use]
    pub fn socket(server: &Server) -> PathBuf {
        server.state.join("http.sock")
    }

    /// Through the address of the server.
    #[must_use]
    pub fn tcp(server: &Server) -> Self {
        Self {
            url: format!("http://{}:{HTTP_PORT}", server.address),
            options: Vec::new(),
        }
    }

    /// With one more header.
    #[must_use]
    pub fn with(mut self, header: &str) -> Self {
        self.options
            .extend(["--header".to_owned(), header.to_owned()]);
        self
    }

    /// With a token.
    #[must_use]
    pub fn bearer(self, token: &str) -> Self {
        self.with(&format!("Authorization: Bearer {token}"))
    }

    pub fn get(&self, path: &str) -> HttpAnswer {
        self.ask(path, &[])
    }

    pub fn delete(&self, path: &str) -> HttpAnswer {
        self.ask(path, &["--request", "DELETE"])
    }

    pub fn post(&self, path: &str, body: &str) -> HttpAnswer {
        self.ask(path, &["--json", body])
    }

    /// With these options of curl.
    pub fn ask(&self, path: &str, more: &[&str]) -> HttpAnswer {
        let url = format!("{}{path}", self.url);
        let fixed = ["--silent", "--show-error", "--write-out", "\n%{http_code}"];
        let own = self.options.iter().map(String::as_str);
        let words = fixed.into_iter().chain(own).chain(more.iter().copied());
        let ran = try_run(60, "curl", words.chain([url.as_str()])).ok();
        let (text, status) = ran.stdout.rsplit_once('\n').unwrap();
        HttpAnswer {
            status: status.parse().unwrap(),
            text: text.to_owned(),
        }
    }
}
